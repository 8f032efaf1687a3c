"""``python -m lightning_prune`` does what ``lightning-prune`` does."""

from lightning_prune.cli.entry import main

if __name__ == "__main__":
    main()
