"""The page of a published captioner."""

from __future__ import annotations

import json
from typing import Any

from efficap.commands.run_dir import RunDirectory
from efficap.evaluation.report import PERCENT

# Filled by huggingface_hub with what `card_values` gives.
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Captions pictures: {{ encoder }} at {{ image_size }} pixels, {{ n_blocks }} transformer blocks over its feature map,
and a GPT-2 of {{ n_layer }} layers and width {{ n_embd }} that reads them by cross-attention. Trained with efficap.

```python
from efficap import Captioner

captioner = Captioner.from_pretrained("{{ repo_id or "USER/NAME" }}")
print(captioner.caption(["picture.jpg"]))
```
{% if scores %}
## Scores

| split | {{ metrics | join(" | ") }} |
|---|{{ "---|" * metrics | length }}
{% for split, values in scores.items() -%}
| {{ split }} | {{ values | join(" | ") }} |
{% endfor %}
On pycocoevalcap's own scale. CIDEr takes its document frequencies from the references scored, so that splits of
different sizes cannot be compared.
{% endif %}{% if sheet %}
![Pictures with the captions of this model in black and a reference in grey]({{ sheet }})
{% endif %}"""


def card_values(run: RunDirectory) -> dict[str, Any]:
    """What the page says of a run: its model, and the scores and pictures of its evaluations."""
    model = run.config["model"]
    found = {
        file.parent.name: json.loads(file.read_text()) for file in sorted(run.path.glob("eval/*/scores.json"))
    }
    metrics = list(dict.fromkeys(name for scores in found.values() for name in _numbers(scores)))
    sheets = sorted(run.path.glob("eval/*/sheet.png"), key=lambda file: file.parent.name != "test")
    return {
        "name": run.config["name"],
        "encoder": model["encoder"]["name"],
        "image_size": model["image_size"],
        "n_blocks": model["bridge"]["n_blocks"],
        "n_layer": model["decoder"]["n_layer"],
        "n_embd": model["decoder"]["n_embd"],
        "scores": {
            split: [f"{scores[name]:.3f}" if name in _numbers(scores) else "" for name in metrics]
            for split, scores in found.items()
        },
        "metrics": metrics,
        "sheet": str(sheets[0].relative_to(run.path)) if sheets else None,
    }


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name in PERCENT and isinstance(value, float)}
