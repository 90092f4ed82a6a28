"""Train a robot policy from video first, actions second.

A SmolVLA-like policy has two flow-matching heads on one shared expert. The latent head learns latent actions, which a
frozen LAQ teacher reads from video without action labels. The action head then learns robot actions from a few labels.

The method, in reading order (with train_stage2.py and train_stage3.py, where the training steps are):

    config          every option; CoreConfig, the one description of a model
    batch           the contract between data and model; the shape legend of all comments
    preprocess      images, text and vectors as the model reads them, in training and in a rollout
    flow            flow matching: the path, its velocity, Euler steps
    losses          unreduced errors, masked means
    trunk           SmolVLM as a prefix encoder, the attention masks, the expert
    model           SmolVLASharedCore: one prefix pass, then the expert for each head
    laq, laq_config, laq_layers     the teacher: an inverse-dynamics VQ model, LAPA's
    teacher         its training step, and the commands train, label, check
    labels          where latent targets come from: the teacher, or a cache
    data_order      which sample a slot of a step is
    data_loader     samples as batches: frames, frame pairs, action chunks, noise and times
    artifact        the hand-over from Stage 2 to Stage 3

What surrounds it:

    data            reading LeRobotDatasets
    data_info, data_problems, data_values     what is wrong with their info.json; tables; vectors and texts
    data_outliers   what is unusual in vectors: outliers, actions that never change
    mixture, data_views     unlike datasets in a YAML file; which cameras each of them shows
    normalization   statistics of state, actions and latent actions, and what they make of values
    robots          state and actions of several robots in one run: their widths and statistics
    robot_preprocessor  a batch of several robots, and one of relative actions
    relative_actions    actions that are relative to the state
    data_split      held-out episodes, and how the datasets of a run are mixed
    data_table      the datasets of a run, their shares and epochs, for its first lines
    data_columns, data_rows     their tables as memory-mapped columns; rows as ranges, and a random order of them
    data_frames, data_blocks     frames of videos as tensors; every frame of a dataset, once and in order
    video           clips of any kind become a LeRobotDataset; the command
    video_source, video_clips, video_dataset     reading a clip, converting it, the dataset of all clips
    video_captions  texts of clips, and which of them an episode gets
    augmentation    random changes of the policy's images
    attention       rotary positions, grouped queries, masks as biases
    kernels         the same numbers in fewer GPU kernels
    model_parts     which parts of a core train, and how its layers run
    initial         what training starts from: a trunk, an artifact, a SmolVLA policy, a policy of this project
    evaluate        errors on held-out samples
    teacher_config  the options of the teacher's commands
    action_config   those of Stage 3's actions
    laq_codebook    the teacher's codes in training: their use, and where they are placed
    action_decoder  actions for video, from its latent actions and a few demonstrations
    grounding       a teacher that also learns from a few labelled demonstrations
    environments    Meta-World without shadows, PushT, Aloha, and the hash of where an episode begins
    rollouts, rollout_results     episodes of a policy in environments; their files, tables and pictures
    rollout_options               where and how a policy is rolled out
    comparison      success rates: Wilson's interval, McNemar's test
    lerobot_config, lerobot_policy, lerobot_processor     the policy as LeRobot sees it
    lerobot_files, lerobot_card           policies in files; a policy's card, and where its weights are from
    hub, hub_upload     policies, artifacts and teachers to the hub
    serve           LeRobot's asynchronous policy server
    lerobot_smolvla, lerobot_smolvla_files     LeRobot's SmolVLA checkpoints, in and out; the command

Machinery, which the method can be understood without:

    run             keeps a run alive around a script's loop
    run_checkpoint, run_metrics, run_optimizer, run_processes, run_sharding, run_signals     its parts
    label_cache                                             labels kept in files
    label_check, label_health, label_probe, label_pictures     whether labels are worth learning
    cache, feature_cache                       rows computed once; the frozen vision tower's output
    data_check, data_report, data_pictures     a look at datasets before training; the command
    gpu_check, gpu_checks     what nobody can test without a GPU, tried on yours
    trunk_files, laq_files, files     trunks and teachers in files; weights and texts in files
    ranges, paths, refusals, command     the range of every number, what must be at a path; how a refusal is said
    idle_options    options that have no effect beside the others
    launch          what `accelerate launch` sets, as far as it concerns a run
    hashes          what a file or dataset is known by
    locks           a directory that one process at a time may write in

Importing this package imports none of its modules.
"""
