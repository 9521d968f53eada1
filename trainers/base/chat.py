"""Chat prompts, and chat templates with a time limit. Used wherever prompts or messages become tokens.

A chat template is a program that comes with a tokenizer. It may never end.
"""

import signal
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, dicts with a role."""
    return isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)


# Far longer than any conversation takes.
SECONDS = 60.0


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list, **options: Any) -> Any:
    """Calls tokenizer.apply_chat_template. Raises TimeoutError after SECONDS, in the main thread only: signals do not
    reach other threads."""
    if threading.current_thread() is not threading.main_thread():
        return tokenizer.apply_chat_template(messages, **options)

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"the chat template has not ended after {SECONDS:g} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return tokenizer.apply_chat_template(messages, **options)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
