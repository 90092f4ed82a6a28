"""Table and summary.json of the results of a quickstart run.

python examples/summarize.py runs/quickstart
"""

import itertools
import json
import sys
from pathlib import Path


def last_value(run: Path, key: str) -> float:
    """The newest value of a metric in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line][-1]


def successes(rollout: Path) -> dict:
    """Successes by task, and of all tasks together."""
    results = json.loads((rollout / "results.json").read_text())
    tasks = {task: f"{row['successes']} of {row['episodes']}" for task, row in results["by_task"].items()}
    interval = [f"{100 * bound:.0f}%" for bound in results["wilson_95"]]
    return tasks | {"all": f"{results['successes']} of {results['episodes']}, {' to '.join(interval)}"}


def summarize(run: Path) -> dict:
    """Results of all steps, and their minutes from steps.txt, whose lines are "<step> <second when it began>"."""
    marks = [line.rsplit(" ", 1) for line in (run / "steps.txt").read_text().splitlines()]
    minutes = {
        name: round((int(next_start) - int(start)) / 60, 1)
        for (name, start), (_, next_start) in itertools.pairwise(marks)
    }
    health = json.loads((run / "check" / "label_health.json").read_text())
    probe = {
        f"{target}: {name}": [value and round(value, 2) for value in row[name]]
        for target, row in health["measured"]["probe"].items()
        for name in ("latents", "random_teacher", "ceiling", "gained_share")
        if row[name]
    }
    return {
        "teacher": {
            "held_out_reconstruction_error": last_value(run / "laq", "val/reconstruction"),
            "error_of_repeating_the_first_frame": last_value(run / "laq", "val/reconstruction_of_first_frame"),
            "perplexity": last_value(run / "laq", "usage/perplexity"),
        },
        "labels": {"health": health["verdict"], **probe},
        "stage2": {
            "held_out_latent_error": last_value(run / "stage2", "val/latent_error"),
            "error_of_predicting_the_mean": last_value(run / "stage2", "val/latent_error_of_mean"),
        },
        "demonstrations alone": successes(run / "rollout_scratch"),
        "video first": successes(run / "rollout_stage3"),
        "minutes": minutes | {"total": round(sum(minutes.values()), 1)},
        "files": {
            "teacher": str(run / "laq/checkpoints/last/pretrained_model/laq.safetensors"),
            "label_health": str(run / "check"),
            "artifact": str(run / "stage2/artifacts/smolvla_shared_stage2_artifact.safetensors"),
            "policy": str(run / "stage3/checkpoints/last/pretrained_model"),
            "videos": str(run / "rollout_stage3"),
        },
    }


def print_table(summary: dict) -> None:
    rows = [
        (f"{part}: {name.replace('_', ' ')}", f"{value:.4g}" if isinstance(value, float) else str(value))
        for part, values in summary.items()
        for name, value in values.items()
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    result = summarize(directory)
    (directory / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
