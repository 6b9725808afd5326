"""``python -m efficap.demo run=RUN``: a page to try captioners on, and ``POST /caption``."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> None:
    from efficap.demo.serve import serve  # heavy imports wait until the configuration is composed

    serve(cfg)


if __name__ == "__main__":
    run("demo", main)
