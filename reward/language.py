"""Which language a text is in, where its commonest words or its letters say so without doubt.

No model and no list of words beyond those that hold sentences together: a text of two of them in one language, and of
more than in any other, is in that one. A short text is often in none; a script that one language alone is written in
tells by itself, and of any other foreign script its name is told (``script Cyrillic``).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

FEWEST = 2  # of a language's words
READ = 2000  # characters
COMMON = {
    "English": "the and is are was to of in my i it for on that this have has with you not what how why do can "
    "will would be been at from there your when which if but a an as me no we they them their please more than or does",
    "German": "der die das und ist sind war nicht ich mein meine meiner meinem meinen ein eine einen wie warum wann "
    "kann mit für auf dem den von zu wird habe hat es sie wir ihr noch auch aber wenn im zum zur bei",
    "French": "le la les et est sont pas je ma mon mes un une des du que qui pour dans avec sur ne ce cette il elle "
    "nous vous comment pourquoi quand au aux j'ai c'est été",
    "Spanish": "el la los las y es son no mi mis un una de del que para en con por qué cómo cuándo se lo está he ha "
    "pero como su sus al yo porque",
    "Italian": "il lo la gli le e è sono non mio mia un una di del della che per in con come perché quando ho ha si "
    "questo questa ma al alla nel nella i",
    "Portuguese": "o a os as e é são não meu minha um uma de do da dos das que para em com por como quando se foi "
    "está mas no na eu porque ao",
    "Dutch": "de het een en is zijn niet ik mijn van op te dat die voor met hoe waarom wanneer kan heb heeft er wat "
    "maar ook bij naar wordt geen aan",
}
WORDS = {language: frozenset(words.split()) for language, words in COMMON.items()}
SCRIPTS = {"HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "GREEK": "Greek", "CJK": "script Han"}


def language(text: str) -> str | None:
    """Such as ``German``, ``Japanese`` or ``script Cyrillic``; None: it cannot be told."""
    text = unicodedata.normalize("NFKC", text[:READ]).casefold().replace("’", "'")
    script = _script(text)
    if script != "LATIN":
        return None if script is None else SCRIPTS.get(script, f"script {script.title()}")
    words = re.findall(r"[^\W\d_]+(?:'(?:ai|est))?", text)
    counts = Counter({name: sum(word in common for word in words) for name, common in WORDS.items()})
    (first, most), (_, second) = counts.most_common(2)
    return first if most >= FEWEST and most > second else None


def _script(text: str) -> str | None:
    """Of most of the letters, as Unicode names it; kana beside Han are Japanese. None: there are no letters."""
    found = Counter(unicodedata.name(letter, "NONE").split()[0] for letter in text if letter.isalpha())
    kana = [name for name in ("HIRAGANA", "KATAKANA") if found[name]]
    if kana and "CJK" in found:
        found[kana[0]] += found.pop("CJK")
    return found.most_common(1)[0][0] if found else None
