"""`python -m lora_merge`, and the command `lora-merge`."""

import json
import sys

from lora_merge.errors import MemoryLimitError
from lora_merge.system.shortage import telling_shortage
from lora_merge.system.signals import Signals
from lora_merge.system.stopping import Stop
from lora_merge.system.streams import secure


def main() -> None:
    """Signals first: to import the command takes longer than an impatient Ctrl-C. Before them the standard streams, or
    their pipe would get the number of one that is closed."""
    secure()
    try:
        with telling_shortage():
            signals = Signals(Stop())
            from lora_merge import cli
    except MemoryLimitError as error:
        if "--json" in sys.argv:
            print(json.dumps(error.as_json(), indent=2))
        else:
            print(f"lora-merge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    cli.main(signals=signals)


if __name__ == "__main__":
    main()
