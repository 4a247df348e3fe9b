"""`python -m lora_merge`, and the command `lora-merge`."""

from lora_merge.signals import Signals
from lora_merge.stopping import Stop
from lora_merge.streams import secure


def main() -> None:
    """Signals first: to import the command takes longer than an impatient Ctrl-C. Before them the standard streams, or
    their pipe would get the number of one that is closed."""
    secure()
    signals = Signals(Stop())
    from lora_merge import cli

    cli.main(signals=signals)


if __name__ == "__main__":
    main()
