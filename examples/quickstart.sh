#!/usr/bin/env bash
# The whole way once, on a CPU: record video and one demonstration of each of three Meta-World tasks, train a teacher on
# the video, train the core on the teacher's latent actions, fine-tune it on the demonstrations and on the actions that
# the teacher's latent actions stand for. Beside it a policy of the demonstrations alone; then both act.
# These are the commands for your own data, too, with smaller sizes. About 23 minutes on two idle cores.
#
#   examples/quickstart.sh              # runs/quickstart, seed 0
#   SEED=1 RUN=runs/seed1 examples/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart}
TASKS="drawer-open-v3 plate-slide-v3 coffee-button-v3"
if [ -e "$RUN" ]; then
    echo "$RUN exists: remove it, or name another directory with RUN=..." >&2
    exit 1
fi
mkdir -p "$RUN"
export HF_HUB_OFFLINE=1 MUJOCO_GL="${MUJOCO_GL:-osmesa}" # nothing here needs a hub or a display
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
launch() { accelerate launch --config-file configs/accelerate/cpu.yaml "$@"; }
step() { printf '\n== %s\n' "$1" && echo "$1 $SECONDS" >> "$RUN/steps.txt"; }

step "1 record"
# Action-free video: no action column at all. It begins wherever the arm happens to be, demonstrations begin at rest.
# Two cameras see it: from above one does not see how high the arm is.
CAMERAS="--camera topview corner2 --image-size 64"
python examples/record_metaworld.py --kind video --root "$RUN/data/video" --seed "$SEED" --tasks $TASKS --episodes 25 \
    --noise 0 --start-steps 20 $CAMERAS
python examples/record_metaworld.py --kind labelled --root "$RUN/data/demonstrations" --seed "$SEED" --tasks $TASKS \
    --episodes 1 --noise 0 $CAMERAS

step "2 teacher"
# A small LAQ learns latent actions: what happens within 0.05 s (4 frames at 80 fps) of video, as both cameras see it.
launch -m smolvla_shared.teacher train --run-dir "$RUN/laq" --data.roots "$RUN/data/video" --seed "$SEED" \
    --data.label-cameras observation.images.topview observation.images.corner2 --data.frame-gap-s 0.05 \
    --data.num-workers 1 --steps 1200 --batch-size 16 --save-every 600 --eval-every 600

step "3 labels"
# Are its codes worth learning? The arm's position tells how much of the motion is in them. Then all labels, continuous
# ones. Cameras and frame gap are the teacher's from here on.
LAQ="$RUN/laq/checkpoints/last/pretrained_model/laq.safetensors"
python -m smolvla_shared.teacher check --laq-ckpt "$LAQ" --data.roots "$RUN/data/video" --data.num-workers 1 \
    --teacher-kind continuous --pairs 2000 --seed "$SEED" --out "$RUN/check"
launch -m smolvla_shared.teacher label --laq-ckpt "$LAQ" --data.roots "$RUN/data/video" "$RUN/data/demonstrations" \
    --teacher-kind continuous --data.num-workers 1 --label-cache "$RUN/labels"

step "4 stage 2"
# The core learns to predict 0.2 s of latent actions from a frame of one camera, the task text and the arm's position.
LABELS="--labels cache --label-cache $RUN/labels --teacher-kind continuous"
POLICY="--seed $SEED --data.cameras observation.images.topview --data.num-workers 1 --batch-size 16 --flow-draws 4
    --optim.lr 1e-3 --optim.warmup-steps 50"
launch train_stage2.py --run-dir "$RUN/stage2" --data.roots "$RUN/data/video" $LABELS --latent-horizon 4 \
    --label-health "$RUN/check/label_health.json" --model.preset tiny $POLICY \
    --steps 600 --save-every 300 --eval-every 300

step "5 stage 3"
# The action head, and the shared weights with it, learn from the demonstrations and from the video's decoded actions.
# Beside it the same without any video.
POLICY="$POLICY --chunk-size 16 --n-action-steps 8 --steps 1200 --ema-decay 0.99 --save-every 600"
launch train_stage3.py --run-dir "$RUN/stage3" --data.roots "$RUN/data/demonstrations" --video-roots "$RUN/data/video" \
    --stage2-artifact "$RUN/stage2/artifacts/smolvla_shared_stage2_artifact.safetensors" \
    --decode-actions --video-share 0.75 $LABELS --latent-horizon 5 $POLICY
launch train_stage3.py --run-dir "$RUN/scratch" --data.roots "$RUN/data/demonstrations" --model.preset tiny $POLICY

step "6 rollout"
# On equal initial states that neither has seen, the arm anywhere.
act() {
    python rollout.py --policy-path "$RUN/$1/checkpoints/last/pretrained_model" --out "$RUN/rollout_$1" "${@:2}" \
        --env.task $TASKS --env.camera topview --rename observation.image observation.images.topview \
        --env.start-steps 20 --episodes 20 --num-envs 2 --seed $((100 * SEED)) --max-steps 150 --videos all
}
act scratch
act stage3 --compare "$RUN/rollout_scratch/results.json"

step "end"
python examples/summarize.py "$RUN"
