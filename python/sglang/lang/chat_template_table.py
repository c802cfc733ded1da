"""The named chat templates, and the words in a model's path that lead to them.

Formats are those of the models' own Jinja templates. Where one puts a system prompt inside the
first user message, the style is LLAMA2. The beginning-of-text token is the tokenizer's affair.
"""

from __future__ import annotations

from sglang.lang.chat_format import Affixes, ChatTemplate, ChatTemplateStyle

_SENTENCE_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's bars and underscores


def _roles(system: Affixes, user: Affixes, assistant: Affixes) -> dict[str, Affixes]:
    return {"system": system, "user": user, "assistant": assistant}


def _marked(before: str, after: str, end: str) -> dict[str, Affixes]:
    """Roles that stand by name between two marks, each message closed alike."""
    return {role: (f"{before}{role}{after}", end) for role in ("system", "user", "assistant")}


_CHATML = _marked("<|im_start|>", "\n", "<|im_end|>\n")

TEMPLATES = (
    ChatTemplate("default", None, _roles(("SYSTEM:", "\n"), ("USER:", "\n"), ("ASSISTANT:", "\n"))),
    ChatTemplate("claude", None, _roles(("", ""), ("\n\nHuman: ", ""), ("\n\nAssistant:", "")), ()),
    ChatTemplate("chatml", None, _CHATML, ("<|im_end|>",)),
    ChatTemplate("qwen", "You are a helpful assistant.", _CHATML, ("<|im_end|>",)),
    ChatTemplate(
        "qwen-2.5",
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        _CHATML,
        ("<|im_end|>",),
    ),
    ChatTemplate(
        "llama-2-chat",
        None,
        _roles(("<<SYS>>\n", "\n<</SYS>>\n\n"), ("[INST] ", " [/INST]"), ("", " </s><s>")),
        (),
        ChatTemplateStyle.LLAMA2,
    ),
    ChatTemplate(
        "llama-3-instruct",
        None,
        _marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|eot_id|>",),
    ),
    ChatTemplate(
        "llama-4",
        None,
        _marked("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"),
        ("<|eot|>",),
    ),
    ChatTemplate(
        "mistral",
        None,
        _roles(("", "\n\n"), ("[INST] ", " [/INST]"), ("", "</s>")),
        ("</s>",),
        ChatTemplateStyle.LLAMA2,
    ),
    ChatTemplate(
        "mistral-v7",
        None,
        _roles(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), ("", "</s>")),
        ("</s>",),
    ),
    ChatTemplate(
        "gemma-it",
        None,
        _roles(
            ("", "\n\n"),
            ("<start_of_turn>user\n", "<end_of_turn>\n"),
            ("<start_of_turn>model\n", "<end_of_turn>\n"),
        ),
        ("<end_of_turn>",),
        ChatTemplateStyle.LLAMA2,
    ),
    ChatTemplate("phi-3", None, _marked("<|", "|>\n", "<|end|>\n"), ("<|end|>",)),
    ChatTemplate("phi-4-mini", None, _marked("<|", "|>", "<|end|>"), ("<|end|>",)),
    ChatTemplate(
        "phi-4", None, _marked("<|im_start|>", "<|im_sep|>", "<|im_end|>"), ("<|im_end|>",)
    ),
    ChatTemplate(
        "deepseek-v3",
        None,
        _roles(
            ("", ""),
            ("<\uff5cUser\uff5c>", ""),
            ("<\uff5cAssistant\uff5c>", _SENTENCE_END),
        ),
        (_SENTENCE_END,),
    ),
    ChatTemplate(
        "deepseek-chat",
        None,
        _roles(("", "\n\n"), ("User: ", "\n\n"), ("Assistant:", _SENTENCE_END)),
        (_SENTENCE_END,),
    ),
    ChatTemplate(
        "deepseek-coder",
        None,
        _roles(("", ""), ("### Instruction:\n", "\n"), ("### Response:\n", "\n<|EOT|>\n")),
        ("<|EOT|>",),
    ),
    ChatTemplate(
        "vicuna_v1.1",
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.",
        _roles(("", " "), ("USER: ", " "), ("ASSISTANT:", "</s>")),
    ),
    ChatTemplate("zephyr", None, _marked("<|", "|>\n", "</s>\n"), ("</s>",)),
    ChatTemplate(
        "openchat",
        None,
        _roles(
            ("GPT4 Correct System: ", "<|end_of_turn|>"),
            ("GPT4 Correct User: ", "<|end_of_turn|>"),
            ("GPT4 Correct Assistant:", "<|end_of_turn|>"),
        ),
        ("<|end_of_turn|>",),
    ),
    ChatTemplate(
        "c4ai-command-r",
        None,
        _roles(
            ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ),
        ("<|END_OF_TURN_TOKEN|>",),
    ),
    ChatTemplate(
        "granite-3-instruct",
        None,
        _marked("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n"),
        ("<|end_of_text|>",),
    ),
    ChatTemplate(
        "glm-4",
        None,
        _marked("<|", "|>\n", ""),
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
    ),
    ChatTemplate("olmo-2", None, _marked("<|", "|>\n", "\n"), ("<|endoftext|>",)),
    ChatTemplate(
        "gpt-oss",
        None,
        _roles(
            ("<|start|>system<|message|>", "<|end|>"),
            ("<|start|>user<|message|>", "<|end|>"),
            ("<|start|>assistant<|channel|>final<|message|>", "<|end|>"),
        ),
        ("<|end|>", "<|return|>"),
    ),
)

# Searched in a model's path without regard to case; the first that is found decides. Models that
# were derived from others stand before those that they name: DeepSeek-R1-Distill-Qwen is no Qwen.
FAMILIES = (
    (r"claude", "claude"),
    (r"smollm|hermes|chatml|orca|dolphin|internlm|yi[-_.\d]*.*chat|dbrx", "chatml"),
    (r"vicuna|llava-v1\.5|llava-next-video-7b", "vicuna_v1.1"),
    (r"zephyr|tinyllama.*chat", "zephyr"),
    (r"openchat", "openchat"),
    (r"olmo-?2|tulu", "olmo-2"),
    (r"deepseek.*(v3|r1)", "deepseek-v3"),
    (r"deepseek-?coder(?!-?v2)", "deepseek-coder"),
    (r"deepseek", "deepseek-chat"),
    (r"qwen-?3|qwq", "chatml"),
    (r"qwen-?2\.5", "qwen-2.5"),
    (r"qwen.*(chat|instruct)", "qwen"),
    (r"llama-?2.*chat|codellama.*instruct", "llama-2-chat"),
    (r"llama-?3.*instruct", "llama-3-instruct"),
    (r"llama-?4", "llama-4"),
    (r"mistral-small.*25\d\d|mistral-large.*2411|magistral|devstral", "mistral-v7"),
    (r"(mistral|mixtral|ministral|codestral).*(instruct|\d{4})", "mistral"),
    (r"gemma.*(it|instruct)\b", "gemma-it"),
    (r"phi-?4-(mini|multimodal)", "phi-4-mini"),
    (r"phi-?4", "phi-4"),
    (r"phi-?3", "phi-3"),
    (r"command-r|c4ai", "c4ai-command-r"),
    (r"granite-?3.*instruct", "granite-3-instruct"),
    (r"glm-?4", "glm-4"),
    (r"gpt-oss", "gpt-oss"),
)
