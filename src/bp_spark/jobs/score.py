"""Score every user of a date. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark score`` with the arguments of this process."""
    cli.main("score")


if __name__ == "__main__":
    main()
