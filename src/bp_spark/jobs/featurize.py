"""Ingest, clean, and build user features for as-of dates. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark featurize`` with the arguments of this process."""
    cli.main("featurize")


if __name__ == "__main__":
    main()
