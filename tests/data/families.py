"""Tiny tokenizers of the kinds that models have, and chat templates of the kinds that they come
with; everything is trained here, on a few lines of text.

A tokenizer's kind decides what stands before a text that is tokenised alone: nothing (byte-level
BPE), a mark for a space before every piece of text (Prepend, Metaspace always), before the first
(Metaspace first), or before words (WordPiece). A template's kind decides what an answer follows: a
newline, a space, or a marker.
"""

import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "<|sys|>", "<|user|>", "<|bot|>", "<|end|>"]
LINES = [
    "Where does the old ferry land in winter? At the stone pier, two hours after the tide.",
    "Name a small grey cat. Pebble is good, and so is Ash; I would take the first one.",
    "Sure, here we go: one, two, three, four. Please tell me how many there are!",
    "USER: ASSISTANT: system user assistant think tool calls [INST] [/INST] ### Answer:",
    "I do not know that. Could you say more about the garden, the bread or the bridge?",
] * 3
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _sentencepiece_like(prepend: str) -> Tokenizer:
    """BPE over text whose spaces are marks, with bytes for what it does not know.

    prepend: "normalizer" (Llama 2, Mistral 0.1 with legacy=True), or Metaspace's "first", "always",
    "never".
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    alphabet = sorted({*"".join(LINES), SPACE})
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=SPECIAL + BYTES,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([SPACE + word for line in LINES for word in line.split()], trainer)
    if prepend == "normalizer":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=False)
    strip = [] if prepend == "never" else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    return core


def _unigram(prepend: str) -> Tokenizer:
    """As T5 and its relatives have it: Unicode normalised, text split at spaces."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " \u2028 ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend)
    core.decoder = decoders.Metaspace(SPACE, prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=250,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=["\u2028"],
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    return core


def _word_piece() -> Tokenizer:
    """As BERT has it: lower case, words and marks apart, white space gone."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    return core


TOKENIZERS = {
    "byte-level": lambda: _byte_level(False),
    "byte-level, prefix space": lambda: _byte_level(True),
    "sentencepiece, legacy": lambda: _sentencepiece_like("normalizer"),
    "metaspace first": lambda: _sentencepiece_like("first"),
    "metaspace always": lambda: _sentencepiece_like("always"),
    "metaspace never": lambda: _sentencepiece_like("never"),
    "unigram first": lambda: _unigram("first"),
    "unigram always": lambda: _unigram("always"),
    "wordpiece": _word_piece,
}
LOSSY = {"unigram first", "unigram always", "wordpiece"}  # decoding does not give the text back


def _template(user: str, assistant: str, header: str, system: str = "{s}", start: str = "") -> str:
    """A template that writes each turn as `user`, `assistant`, `system` say, {t} for the text."""

    def spell(text, turn):
        quoted = ["'" + part.replace("\n", "\\n") + "'" for part in text.split("{t}")]
        return f" + {turn} + ".join(quoted)

    return (
        "{{ '" + start + "' }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ " + spell(system, "m['content']") + " }}"
        "{% elif m['role'] == 'user' %}{{ " + spell(user, "m['content']") + " }}"
        "{% elif m['role'] == 'tool' %}{{ " + spell(user, "m['content']") + " }}"
        "{% else %}{{ " + spell(assistant, "TEXT") + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + header.replace("\n", "\\n") + "' }}{% endif %}"
    ).replace("TEXT", "m['content']")


NEWLINE = _template(
    "<|user|>\n{t}<|end|>\n", "<|bot|>\n{t}<|end|>\n", "<|bot|>\n", "<|sys|>\n{t}<|end|>\n"
)
MARKER = _template("<|user|>{t}", "<|bot|>{t}</s>", "<|bot|>", "<|sys|>{t}", "<s>")
# kind -> template. The end token is what stands behind the answer.
TEMPLATES = {
    "after a newline": NEWLINE,
    "after a newline, marks as text": _template(
        "### User:\n{t}\n\n", "### Answer:\n{t}</s>\n", "### Answer:\n", "{t}\n\n"
    ),
    "after a marker": MARKER,
    "after a marker that is text": _template("[INST]{t}[/INST]", "{t}</s>", "", "{t}", "<s>"),
    "a space before the answer": _template("[INST] {t} [/INST]", " {t} </s>", "", "{t} ", "<s>"),
    "after a space": _template("USER: {t} ", "ASSISTANT: {t}</s>", "ASSISTANT: ", "{t} ", "<s>"),
    "after a colon": _template("USER: {t} ", "ASSISTANT: {t}</s>", "ASSISTANT:", "{t} ", "<s>"),
    "after a space, no end token": _template(
        "USER: {t}\n", "ASSISTANT: {t}\n", "ASSISTANT: ", "{t}\n"
    ),
    "a thought opened in the header": MARKER.replace(
        "{{ '<|bot|>' }}", "{{ '<|bot|><think>\\n' }}"
    ),
    "trimmed answers": NEWLINE.replace(
        "'<|bot|>\\n' + m['content']", "'<|bot|>\\n' + m['content'] | trim"
    ),
    "thoughts cut from finished answers": MARKER.replace(
        "'<|bot|>' + m['content']", "'<|bot|>' + m['content'].split('</think>')[-1]"
    ),
    "an empty thought before the answer": NEWLINE.replace(
        "'<|bot|>\\n' + m['content']",
        "'<|bot|>\\n' + ('' if '<think>' in m['content'] else '<think>\\n\\n</think>\\n\\n') + m['content']",
    ),
    "system text in the last turn of the user": (
        "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ '<s>' }}"
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (s + '\\n\\n' if s and loop.last else '') + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
}


def tokenizer(kind: str, template: str, adds_bos: bool = False):
    """A tokenizer of the kind, with the template (a name of TEMPLATES, or one's text)."""
    core = TOKENIZERS[kind]()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=SPECIAL[3:],
    )
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    made.chat_template = TEMPLATES.get(template, template)
    return made


def slow_sentencepiece(folder, legacy: bool, model_type: str, template: str):
    """A tokenizer of the sentencepiece library itself, in Python (a "slow" one)."""
    import sentencepiece  # of the `test` extra: optional
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "sp"),
        model_type=model_type,
        vocab_size=430 if model_type == "bpe" else 400,
        byte_fallback=True,
        user_defined_symbols=SPECIAL[3:],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = SentencePieceBackend(
        vocab_file=str(folder / "sp.model"),
        legacy=legacy,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = TEMPLATES.get(template, template)
    return made
