"""Check whether the cluster is fit for a night. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark doctor`` with the arguments of this process."""
    cli.main("doctor")


if __name__ == "__main__":
    main()
