"""What a sweep's trials say, as files: all trials as CSV and the rest as JSON, from which README's table is made.

python -m benchmarks.sweep_report ID --run runs/sweep --results results/sweep-excerpt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import optuna
import pandas as pd
import torch

from helpers.batches import Prepared
from helpers.evaluation import evaluate
from helpers.importance import effects, importance, importance_intervals
from helpers.model import new_model
from helpers.run import Run, choose_device, machine, write_json, write_text
from helpers.settings import Settings, UserError
from helpers.sweep import LOSS, best_settings, open_study, seeds_table, trial_table


def report(study: optuna.Study, run: Run, target: Path, seeds: int, device: torch.device) -> None:
    """Write what a sweep showed: all trials to TARGET.csv, and to TARGET.json the rest.

    That is importance by all measures, for all trials and for those of the best trial's optimiser, where trials that
    ended at the very same loss (a clip that never acted leaves such copies) count once; what clip=0 taken literally
    would have made of it; and the best settings against the starting point at equal updates.
    """
    table, spec, base = trial_table(study), study.user_attrs["spec"], Settings(**study.user_attrs["base"])
    prepared = Prepared.load(run.sweep / study.study_name / "data.pt")
    choices = {"starting point": base, "best of the sweep": best_settings(study)}
    validation = prepared.splits["validation"].to(device)
    untrained = evaluate(new_model(base, len(prepared.vocabulary)).to(device), validation).per_token
    kind = study.best_trial.params.get("optimizer")
    alone = table[table["optimizer"] == kind].drop_duplicates(LOSS) if kind else table[:0]
    parts = {"all trials": table} | ({f"{kind} alone": alone} if len(alone) >= 10 else {})
    found = {
        "sweep": study.study_name, "spec": spec, "starting point": base.to_dict(), "corpus": prepared.corpus,
        "states": table["state"].value_counts().to_dict(), "workers": table["worker"].nunique(),
        "best": study.best_trial.params,
        "seconds a trial": {"median": table["seconds"].median(), "longest": table["seconds"].max()},
        "importance": {name: _records(importance(part, spec)) for name, part in parts.items()},
        "fANOVA interval": {name: _records(importance_intervals(part, spec, 50)) for name, part in parts.items()},
        "effects": {name: _records(effects(part, list(spec["parameters"]))) for name, part in parts.items()},
        "untrained loss": untrained,
        "seeds": _records(seeds_table(run, prepared, choices, seeds, device)),
        "machine": machine(device),
    }  # fmt: skip
    if "clip" in table and (table["clip"] == 0).any():
        # As if 0 were handed to `clip_grad_norm_`: every gradient 0, and a model that stays untrained.
        frozen = table.assign(**{LOSS: table[LOSS].mask(table["clip"] == 0, untrained)})
        found["importance if clip=0 froze the model"] = _records(importance(frozen, spec))
    write_text(target.with_suffix(".csv"), table.to_csv(index=False))
    write_json(target.with_suffix(".json"), found)


def _records(table: pd.DataFrame) -> list[dict]:
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names="parameter")
    return json.loads(table.to_json(orient="records", double_precision=6))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="the sweep's id")
    parser.add_argument("--run", type=Path, required=True, help="the folder of its run")
    parser.add_argument("--results", type=Path, required=True, metavar="PATH", help="write PATH.json and PATH.csv")
    parser.add_argument("--storage", default="", help="a database's URL, if it is not in the run's folder")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison with the starting point")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        study = open_study(Run(options.run), options.sweep, options.storage)
        report(study, Run(options.run), options.results, options.seeds, choose_device(options.device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
