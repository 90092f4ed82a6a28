#!/usr/bin/env bash
# The whole way once, on a CPU: record video and a few demonstrations in Meta-World, train a teacher on the video,
# train the core on the teacher's latent actions, fine-tune on the demonstrations, and let the policy act.
# These are the commands for your own data, too, with smaller sizes. 11 minutes on two idle cores.
#
#   examples/quickstart.sh              # runs/quickstart, seed 0
#   SEED=1 RUN=runs/seed1 examples/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart}
TASK=plate-slide-v3
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
# Action-free video of several tasks: no action column at all. Then a few labelled demonstrations of the target task.
python examples/record_metaworld.py --kind video --root "$RUN/data/video" --seed "$SEED" --episodes 20 \
    --tasks plate-slide-v3 window-open-v3 handle-press-v3 button-press-topdown-v3
python examples/record_metaworld.py --kind labelled --root "$RUN/data/labelled" --seed "$SEED" --episodes 25 --tasks $TASK

step "2 teacher"
# A small LAQ learns codes for what happens within 0.05 s (4 frames at 80 fps) of video.
launch -m smolvla_shared.teacher train --run-dir "$RUN/laq" --data.roots "$RUN/data/video" --seed "$SEED" \
    --data.frame-gap-s 0.05 --data.num-workers 1 --steps 1200 --batch-size 16 --save-every 600 --eval-every 600

step "3 labels"
# Are its codes worth learning? The demonstrations tell how much of the executed action is in them, the arm's position
# how much of the motion. Then all labels. The frame gap is the teacher's from here on.
LAQ="$RUN/laq/checkpoints/last/pretrained_model/laq.safetensors"
python -m smolvla_shared.teacher check --laq-ckpt "$LAQ" --data.roots "$RUN/data/video" "$RUN/data/labelled" \
    --data.num-workers 1 --pairs 3000 --seed "$SEED" --out "$RUN/check"
launch -m smolvla_shared.teacher label --laq-ckpt "$LAQ" --data.roots "$RUN/data/video" \
    --data.num-workers 1 --label-cache "$RUN/labels"

step "4 stage 2"
# The core learns to predict the teacher's latent actions from one frame, the task text and the arm's position.
launch train_stage2.py --run-dir "$RUN/stage2" --labels cache --label-cache "$RUN/labels" \
    --label-health "$RUN/check/label_health.json" \
    --data.roots "$RUN/data/video" --seed "$SEED" --model.preset tiny --data.num-workers 1 \
    --steps 500 --batch-size 32 --flow-draws 4 --optim.lr 1e-3 --optim.warmup-steps 100 --save-every 250 --eval-every 250

step "5 stage 3"
# The action head, and the shared weights with it, learn from the labelled demonstrations.
launch train_stage3.py --run-dir "$RUN/stage3" \
    --stage2-artifact "$RUN/stage2/artifacts/smolvla_shared_stage2_artifact.safetensors" \
    --data.roots "$RUN/data/labelled" --seed "$SEED" --data.num-workers 1 --chunk-size 16 --n-action-steps 8 \
    --steps 600 --batch-size 32 --flow-draws 4 --optim.lr 1e-3 --optim.warmup-steps 100 --ema-decay 0.99 \
    --save-every 300 --eval-every 200

step "6 rollout"
python rollout.py --policy-path "$RUN/stage3/checkpoints/last/pretrained_model" --env.type metaworld --env.task $TASK \
    --episodes 20 --num-envs 2 --seed $((100 * SEED)) --max-steps 200 --out "$RUN/rollout" --videos all

step "end"
python examples/summarize.py "$RUN"
