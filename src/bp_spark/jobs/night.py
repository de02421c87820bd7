"""Run a whole night. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark night`` with the arguments of this process."""
    cli.main("night")


if __name__ == "__main__":
    main()
