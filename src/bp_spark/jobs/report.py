"""Write the page of a night. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark report`` with the arguments of this process."""
    cli.main("report")


if __name__ == "__main__":
    main()
