"""`iwm-ray <command>` is the same as `python -m iwm_ray.<command>`."""

import importlib
import sys

COMMANDS = (
    "pretrain",
    "evaluate",
    "visualize",
    "finetune",
    "segment",
    "export",
    "predict",
    "replay",
    "doctor",
)


def main() -> None:
    """Hands the arguments to the command that the first one names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        print(f"usage: iwm-ray {{{'|'.join(COMMANDS)}}} ...", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    importlib.import_module(f"iwm_ray.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
