"""Make a synthetic platform of any size. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark generate`` with the arguments of this process."""
    cli.main("generate")


if __name__ == "__main__":
    main()
