"""Erase users from every table and file. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark forget`` with the arguments of this process."""
    cli.main("forget")


if __name__ == "__main__":
    main()
