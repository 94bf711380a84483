"""`python -m hf_quest.cli`, which is `hf-quest`."""

from hf_quest_cli import app

if __name__ == "__main__":
    app()
