"""Caption pictures with a trained captioner: python caption.py run=RUN_DIR images=PATH."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> Any:
    from efficap.commands.caption import caption  # heavy imports wait until the configuration is composed

    return caption(cfg)


if __name__ == "__main__":
    run("caption", main)
