"""Which families keep the documents of a block apart: the launcher's probe, asked of every causal class in transformers.

    python benchmarks/borders.py [--attention flash_attention_2] [--config Llama ...]

Prints a list of families for each verdict, as docs/packing.md has it. A family is probed from the default config of its class;
a checkpoint's own config can differ (LFM2's default has no convolution), and is what a launch asks about.
"""

import argparse
import logging
import signal
from collections import defaultdict

import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ds_stability.data.border_probe import Borders, probe_borders

SECONDS = 60  # some classes compile kernels or loop over positions for minutes
VERDICTS = {"apart": "apart", "leak": "not apart", "future": "see the future (encoders without `is_decoder`)",
            "unknown": "unknown: no small model of the default config could be built and run"}  # fmt: skip


class _TooLongError(Exception):
    pass


def _stop(*_):
    raise _TooLongError(f"more than {SECONDS} seconds")


def ask(kind: type, attention: str | None) -> tuple[str, Borders]:
    """(verdict, what the probe saw) of the default config of a class."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        borders = probe_borders(kind(), lambda small, **options: AutoModelForCausalLM.from_config(small, **options), attention)
    except Exception as error:  # the default config itself cannot be built
        borders = Borders(kind.__name__, reason=f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    verdict = "unknown" if not borders.known else "future" if not borders.causal else "apart" if borders.apart else "leak"
    return verdict, borders


def survey(attention: str | None = None, only: list[str] | None = None) -> dict[str, list[str]]:
    """Names of config classes, without "Config", by verdict."""
    found = defaultdict(list)
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()), key=lambda kind: kind.__name__):
        name = kind.__name__.removesuffix("Config")
        if only and name not in only:
            continue
        verdict, borders = ask(kind, attention)
        found[verdict].append(name)
        print(f"{name:32s} {verdict:8s} {borders}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", help="eager, sdpa or flash_attention_2 (a stand-in on the CPU)")
    parser.add_argument("--config", nargs="+", help="names of config classes, without Config")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = survey(options.attention, options.config)
    for verdict, title in VERDICTS.items():
        print(f"\n**{title}** ({len(found[verdict])}): {', '.join(found[verdict])}")
    print(f"\ntransformers {transformers.__version__}")


if __name__ == "__main__":
    main()
