"""`python -m lora_merge`."""

from lora_merge.cli import main

if __name__ == "__main__":
    main()
