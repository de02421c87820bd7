"""Train, evaluate and promote a model bundle. See --help."""

from bp_spark import cli


def main() -> None:
    """Run ``bp-spark train`` with the arguments of this process."""
    cli.main("train")


if __name__ == "__main__":
    main()
