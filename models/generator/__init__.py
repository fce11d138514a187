"""Writes the conversations that shimmy-tiny is trained on.

The text is in models/text, in the notation that `language.grammars` reads; these modules choose from it and compute what
has to be computed (numbers, dates, JSON, results of tools). Everything is drawn from the random.Random that is passed
in, so the same seed gives the same conversations.

    language.py   the notation, word lists, and the way users type
    unseen.py     what training must never show, because the evaluation asks it
    facts.py      small talk, questions about shimmy, small facts
    tasks.py      JSON and stories
    tools.py      tools, sums, calls and results
    chats.py      whole conversations, and the chat template
"""

from .chats import CHAT_TEMPLATE, Chat, conversation
from .language import Message

SEED = 20261122

__all__ = ["CHAT_TEMPLATE", "SEED", "Chat", "Message", "conversation"]
