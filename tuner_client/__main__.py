"""``python -m tuner_client``: the ``tuner-client`` command."""

from tuner_client.cli.main import main

if __name__ == "__main__":
    main()
