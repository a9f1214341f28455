"""Fields that clients know and this server does not honour, each with what to do instead.

They would change the answer if they were ignored, so a request that sets one is refused by name.
"""

_STRUCTURED = "use structured_outputs or response_format"
_BEAMS = "use /v1/completions or /v1/chat/completions"
_OTHER_SERVERS = "this server works alone"
_TEXT_ONLY = "only text is taken and generated"

GENERATION = {
    "early_stopping": "a beam search ends where nothing better can be found",
    "structural_tag": _STRUCTURED,
    "regex": _STRUCTURED,
    "json_schema": _STRUCTURED,
    "ebnf": _STRUCTURED,
    "prompt_embeds": "only text and token ids are taken",
    "truncate_prompt_tokens": "prompts are never cut; shorten it",
    "logits_processors": "a request cannot bring code",
    "vllm_xargs": "a request cannot bring code",
    "repetition_detection": "use repetition_penalty",
    "logprob_token_ids": "use logprobs",
    "prompt_logprob_token_ids": "use prompt_logprobs",
    "return_tokens_as_token_ids": "use logprobs, which give tokens as strings and bytes",
    "return_token_ids": "use /tokenize",
    "return_prompt_text": "use echo, or /tokenize and /detokenize",
    "request_id": "send the header X-Request-Id",
    "kv_transfer_params": _OTHER_SERVERS,
    "ec_transfer_params": _OTHER_SERVERS,
}
COMPLETION = GENERATION | {
    "suffix": "this model does not fill in the middle",
    "thinking_token_budget": "use /v1/chat/completions, which knows how thoughts are marked",
}
CHAT = GENERATION | {
    "echo": "use continue_final_message, or /v1/completions",
    "chat_template": "the model's own template is used",
    "functions": "use tools",
    "function_call": "use tools",
    "documents": "put them into messages",
    "audio": _TEXT_ONLY,
    "media_io_kwargs": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "web_search_options": "this server does not search",
    "verbosity": "say it in messages",
    "moderation": "this server does not moderate",
}
WITHOUT_BEAMS = GENERATION | {"best_of": _BEAMS, "use_beam_search": _BEAMS}
RESPONSE = WITHOUT_BEAMS | {
    "previous_response_id": "responses are not stored; send the whole conversation as input",
    "conversation": "conversations are not stored; send the whole one as input",
    "prompt": "prompts are not stored; send the text as input",
    "background": "responses are not stored; use stream",
    "context_management": "send the conversation as it shall be read",
    "chat_template": "the model's own template is used",
    "image": _TEXT_ONLY,
    "moderation": "this server does not moderate",
}
EMBEDDING = {
    "dimensions": "vectors have the model's own size",
    "truncate_prompt_tokens": "prompts are never cut; shorten it",
    "messages": "send their text as input",
    "embed_dtype": "vectors are float32",
}
TOKENIZATION = {"chat_template": "the model's own template is used"}
