"""One small conversation, written in each format."""

import json

TOOL = {
    "type": "function",
    "function": {"name": "bash", "description": "Run.", "parameters": {"type": "object"}},
}
ARGUMENTS = '{"command": "ls -l"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": ARGUMENTS}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many files are there?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "total 2"},
    {"role": "assistant", "content": "There are 2."},
]
TEXTS = [f'I look.\n<tool_call>\n{{"name": "bash", "arguments": {ARGUMENTS}}}\n</tool_call>']
TEXTS.append("There are 2.")
OPENAI = {"messages": MESSAGES, "tools": [TOOL]}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "How many files are there?"},
        {"from": "gpt", "value": TEXTS[0]},
        {"from": "tool", "value": "<tool_response>\ntotal 2\n</tool_response>"},
        {"from": "gpt", "value": "There are 2."},
    ],
    "tools": json.dumps([TOOL]),
}
ATIF = {
    "schema_version": "ATIF-v1.6",
    "session_id": "s",
    "agent": {"name": "harbor-agent", "version": "1", "tool_definitions": [TOOL]},
    "steps": [
        {"step_id": 1, "source": "system", "message": "Be brief."},
        {"step_id": 2, "source": "user", "message": "How many files are there?"},
        {
            "step_id": 3,
            "source": "agent",
            "message": "I look.",
            "tool_calls": [
                {"tool_call_id": "c1", "function_name": "bash", "arguments": json.loads(ARGUMENTS)}
            ],
            "observation": {"results": [{"source_call_id": "c1", "content": "total 2"}]},
        },
        {"step_id": 4, "source": "agent", "message": "There are 2."},
    ],
}
SWE_AGENT = {"trajectory": [], "history": MESSAGES, "tools": [TOOL], "info": {}}
TAU_BENCH = {"task_id": 0, "reward": 1.0, "traj": MESSAGES, "tools": [TOOL]}
NEMO_GYM = {
    "responses_create_params": {
        "input": [
            {"role": "system", "content": "Be brief.", "type": "message"},
            {"role": "user", "content": [{"type": "input_text", "text": MESSAGES[1]["content"]}]},
        ],
        "tools": [{"type": "function", "strict": True, **TOOL["function"]}],
    },
    "response": {
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look."}],
            },
            {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": ARGUMENTS},
            {"type": "function_call_output", "call_id": "c1", "output": "total 2"},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "There are 2."}],
            },
        ]
    },
    "reward": 1.0,
}
PREFERENCE = {
    "prompt": MESSAGES[:4],
    "chosen": MESSAGES[4:],
    "rejected": [{"role": "assistant", "content": "There are 3."}],
    "tools": [TOOL],
}
ALL = {
    "openai": OPENAI,
    "sharegpt": SHAREGPT,
    "atif": ATIF,
    "swe_agent": SWE_AGENT,
    "tau_bench": TAU_BENCH,
    "nemo_gym": NEMO_GYM,
    "preference": PREFERENCE,
}
