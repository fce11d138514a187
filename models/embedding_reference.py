"""Writes reference vectors of all-MiniLM-L6-v2 as Hugging Face's transformers computes them.

    python embedding_reference.py MODEL_DIRECTORY OUT.json

50 texts of one word to 256 tokens in five languages; mean of the last states, length 1, as the model's card says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

WORDS = {
    "English": "The river carried the small boats past the old mill while children watched from the bridge and the evening "
    "light turned the water into copper and gold until the bells of the village church began to ring",
    "German": "Der Fluss trug die kleinen Boote an der alten Mühle vorbei während Kinder von der Brücke zusahen und das "
    "Abendlicht das Wasser in Kupfer und Gold verwandelte bis die Glocken der Dorfkirche läuteten",
    "French": "La rivière emportait les petits bateaux devant le vieux moulin pendant que les enfants regardaient depuis le pont "
    "et que la lumière du soir changeait l'eau en cuivre et en or",
    "Chinese": " ".join("河水载着小船经过古老的磨坊孩子们在桥上观看傍晚的阳光把河水变成了铜和金直到村里教堂的钟声响彻宁静的田野"),
    "Russian": "Река несла маленькие лодки мимо старой мельницы пока дети смотрели с моста а вечерний свет превращал воду в медь "
    "и золото пока колокола деревенской церкви не зазвонили над тихими полями",
}
LENGTHS = (1, 5, 6, 8, 12, 18, 32, 64, 128, 256)  # tokens, the first and last ones included; 1: one word, however many that are
LONGEST = 256  # what the model was trained with


def texts(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Language and text: for each length as many words, from another start each, as do not exceed it."""
    for language, sentence in WORDS.items():
        words = sentence.split()
        for start, length in enumerate(LENGTHS):
            joiner = "" if language == "Chinese" else " "
            text = words[start]
            for word in (words[(start + n) % len(words)] for n in range(1, LONGEST)):
                longer = text + joiner + word
                if len(tokenizer(longer)["input_ids"]) > length:
                    break
                text = longer
            yield language, text


def main(model_directory: str, out: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(model_directory), AutoModel.from_pretrained(model_directory).eval()
    rows = []
    for language, text in texts(tokenizer):
        inputs = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state.mean(1)
        vector = torch.nn.functional.normalize(mean, dim=1)[0].tolist()
        rows.append({"language": language, "tokens": inputs["input_ids"].shape[1], "text": text, "vector": vector})
    Path(out).write_text(json.dumps(rows, ensure_ascii=False))
    print(f"{len(rows)} texts of {min(r['tokens'] for r in rows)} to {max(r['tokens'] for r in rows)} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
