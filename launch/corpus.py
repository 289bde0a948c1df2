r"""Makes a set of documents for continual pre-training from git repositories and trajectories.

python -m launch.corpus --out OUT REPOSITORY...
python -m launch.corpus --out OUT --trajectories runs/ipa/trajectories REPOSITORY...
python -m launch.corpus --out OUT --packages .venv/lib/python3.11/site-packages REPOSITORY...

Writes OUT/stage1 and OUT/stage2, which experiments/cpt.py:stage1 and :stage2 learn from, and
OUT/card.json. Repositories are local clones; their code runs in sandboxes only. After a kill the
same command goes on where it was. docs/corpus.md describes the documents.
"""

from __future__ import annotations

import asyncio
import pathlib

from absl import flags

from launch._main import run_command

OUT = flags.DEFINE_string("out", None, "folder of the run")
TRAJECTORIES = flags.DEFINE_string("trajectories", "", "files or folders for the second stage")
COMMITS = flags.DEFINE_integer("commits", 400, "newest ones of each repository", lower_bound=0)
RUN = flags.DEFINE_bool("run", True, "run tests in sandboxes, for documents of tests and steps")
PACKAGES = flags.DEFINE_string(
    "packages", "", "folder of Python packages that these tests can import, such as pytest's"
)
TEST_FILES = flags.DEFINE_list(
    "test_files",
    [],
    "patterns of the files whose tests are run, such as tests/data/*; default: all",
)
FIM_SHARE = flags.DEFINE_float(
    "fim_share", 0.5, "files of which the middle is asked for", lower_bound=0.0, upper_bound=1.0
)
LICENCES = flags.DEFINE_bool("licences", True, "use only sources with a permissive licence")
EVALUATION_SETS = flags.DEFINE_list(
    "evaluation_sets", None, "data sets that must not be in it; default: those of this project"
)
TOKENIZER = flags.DEFINE_string("tokenizer", "", "folder; default: the one of the tiny model")
ISOLATION = flags.DEFINE_string("isolation", "best_available", "of the sandboxes")
CONCURRENCY = flags.DEFINE_integer("concurrency", 2, "units of work at once", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of every choice", lower_bound=0)


def main(argv: list[str]) -> int:
    """Make the set; return 1 if it holds no document."""
    from rome.model.tokenizer import TINY, Tokenizer
    from rome.synth.cpt.corpus import EVALUATION_SETS as OURS
    from rome.synth.cpt.corpus import Settings, build_corpus, describe_card

    if not OUT.value:
        raise ValueError("--out is missing; it is the folder of the run, such as --out=runs/corpus")
    if not (argv[1:] or TRAJECTORIES.value):
        raise ValueError("nothing to read: name folders of git repositories, or --trajectories")
    if PACKAGES.value and not pathlib.Path(PACKAGES.value).is_dir():
        raise ValueError(
            f"--packages={PACKAGES.value} is no folder; `pip install --target DIR pytest` makes one"
        )
    if TEST_FILES.value and not RUN.value:
        raise ValueError("--test_files says which tests are run, and --norun runs none")
    settings = Settings(
        repositories=tuple(argv[1:]),
        trajectories=TRAJECTORIES.value,
        commits=COMMITS.value,
        runs_code=RUN.value,
        packages=str(pathlib.Path(PACKAGES.value).resolve()) if PACKAGES.value else "",
        test_files=tuple(TEST_FILES.value),
        fim_share=FIM_SHARE.value,
        licences=LICENCES.value,
        evaluation_sets=OURS if EVALUATION_SETS.value is None else tuple(EVALUATION_SETS.value),
        seed=SEED.value,
    )
    job = build_corpus(
        settings,
        pathlib.Path(OUT.value),
        Tokenizer.load(TOKENIZER.value or TINY),
        isolation=ISOLATION.value,
        concurrency=CONCURRENCY.value,
        say=lambda text: print(text, flush=True),
    )
    card = asyncio.run(job)
    print("\n".join(describe_card(card)))
    return 0 if card["documents"] else 1


if __name__ == "__main__":
    run_command("launch.corpus", main)
