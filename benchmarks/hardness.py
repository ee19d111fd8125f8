"""Hardness against price: every knob of hard views, replayed on the scores that a run logged. Nothing is scored again.

python benchmarks/hardness.py RUN [RUN ...] [--views N] [--json FILE] [--figure FILE]

RUN is the folder of a run with scored candidates (selection.rule=hardest, or selection.score_always with another rule). Log
every step: tracking.selection_images_per_epoch at least the images of an epoch. Each setting is a point:

    kept  = (score of what is trained on - mean of all candidates) / (score of the hardest - mean of all candidates)
    price = operations of a step / operations of a step of random views, counted (`describe.py` counts alike)

1 is the hardest candidate of the first N views (default 4), 0 a random one. So other numbers of views may keep more than 1.

    random, min_iou  a random pair; the pair of least overlap. Nothing is scored.
    views            the hardest of fewer or more global views; 2 fixes them and chooses local views only
    every, share     hard every k-th step; only a share of the images of each step scored
    rescue           two views scored; all views of this share of a step, its easiest images, rendered and scored
    limit            the hardest of this number of random candidates (the authors: 64 or 128)
    quantile         not the hardest, but this place in the order of the scores
    softmax, top_k, matching, partner    all views trained on, pairs weighted by their losses; of the weighted mean
    plans, probes    the pair among this number of plans that a model predicts to be hardest; every fourth step it learns from
                     the first N views of 16 images, or of this number of images

`cheap_scoring.py` asks what cheaper scoring keeps, which needs the network. The interval is the 95 % bootstrap over the
logged steps. The last three columns are the thirds of the run.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from benchmarks.replay.figure import draw_hardness
from benchmarks.replay.kept import KeptScale
from benchmarks.replay.knobs import replay
from benchmarks.replay.scores import LoggedScores
from benchmarks.results_file import Result, open_results
from hvp_ray.config import config_from_dict
from hvp_ray.errors import HvpRayError
from hvp_ray.tracking.logged_pairs import read_selection_log


def replay_run(run: Path, num_views: int) -> Iterator[Result]:
    """Yield a result for each setting."""
    config = config_from_dict(json.loads((run / "config.json").read_text())["config"])
    logged = LoggedScores.of_log(read_selection_log(run), config)
    num_views = min(num_views, logged.candidates.num_views)
    among = logged.of_first_views(num_views)
    scale = KeptScale(step_N=among.step_N, mean_N=among.mean(), hardest_N=among.chosen_by("hardest"))
    windows = scale.thirds()
    context = {
        "method": config.method.name,
        "recipe": config.recipe,
        "rule": config.selection.rule,
        "views": f"{num_views}+{logged.candidates.num_local_views}",
        "images": len(logged.step_N),
        "last_step": int(logged.step_N[-1]),
    }
    for setting in replay(logged, config, num_views):
        kept = scale.of(setting.chosen_N)
        thirds = {name: round(scale.of(setting.chosen_N, third).kept, 4) for name, third in windows.items()}
        name = "-".join(filter(None, (setting.knob, setting.value)))
        yield {
            "name": f"hardness.{config.method.name}.{name}.kept",
            "value": round(kept.kept, 4),
            "low": round(kept.low, 4),
            "high": round(kept.high, 4),
            "unit": "fraction",
            "price": round(setting.price, 4),
            "knob": setting.knob,
            "setting": setting.value,
            **thirds,
            **context,
        }


def main() -> int:
    """Replay each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--views", type=int, default=4, help="global views of the candidates")
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    parser.add_argument("--figure", type=Path, help="draw hardness against price into this file, a panel for each run")
    options = parser.parse_args()
    if options.views < 3:
        parser.error(f"--views {options.views}: expected 3 or more, so that there is a choice")
    panels: dict[str, list[Result]] = {}
    with open_results(options.json, {}) as keep:
        for run in options.runs:
            try:
                results = list(replay_run(run, options.views))
            except (OSError, ValueError, KeyError, HvpRayError) as error:
                parser.error(f"{run} cannot be replayed: {error}")
            keep(results)
            first = results[0]
            title = (
                f"{first['recipe']}, {first['views']} views, {first['images']:,} images to step {first['last_step']}"
            )
            panels[title] = results
            print(f"{title}\n{'setting':<16}{'price':>7}{'kept':>8}{'95 % interval':>18}{'thirds of the run':>26}")
            for result in results:
                print(
                    f"{result['knob'] + ' ' + result['setting']:<16}{result['price']:>7.3f}{result['value']:>8.3f}"
                    f"{result['low']:>10.3f}{result['high']:>8.3f}"
                    f"{result['first']:>10.3f}{result['middle']:>8.3f}{result['last']:>8.3f}"
                )
    if options.figure is not None:
        draw_hardness(options.figure, panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
