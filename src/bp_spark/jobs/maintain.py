"""Join small files and delete old ones. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark maintain`` with the arguments of this process."""
    cli.main("maintain")


if __name__ == "__main__":
    main()
