"""Runs in an environment that has the sglang wheel: parses the bodies on stdin by SGLang's own
request classes, and says what it made of them.

The wheel is installed without its dependencies. What its request classes do not need (torch,
kernels, models) is replaced by empty modules; the request classes, the sampling parameters, their
validators and the contract of /generate are SGLang's own.
"""

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types

REAL = (
    "sglang.srt.managers.io_struct",
    "sglang.srt.sampling",
    "sglang.srt.utils.msgspec_utils",
    "sglang.srt.utils.field_validators",
    "sglang.srt.utils.weight_versions",
    "sglang.srt.entrypoints.api_contract",
    "sglang.api",
    "sglang.srt.beam_search.types",
    "sglang.srt.managers.kv_hints",
    "sglang.srt.managers.embed_types",
    "sglang.srt.lora.lora_registry",
    "sglang.srt.utils.aio_rwlock",
)
PACKAGES = (
    "sglang",
    "sglang.srt",
    "sglang.srt.managers",
    "sglang.srt.utils",
    "sglang.srt.entrypoints",
    "sglang.srt.beam_search",
    "sglang.srt.lora",
)
CLASSES = {
    "/generate": "GenerateReqInput",
    "/pause_generation": "PauseGenerationReqInput",
    "/continue_generation": "ContinueGenerationReqInput",
    "/update_weights_from_disk": "UpdateWeightFromDiskReqInput",
    "/abort_request": "AbortReq",
    "/release_memory_occupation": "ReleaseMemoryOccupationReqInput",
    "/resume_memory_occupation": "ResumeMemoryOccupationReqInput",
    "/weights_checker": "CheckWeightsReqInput",
}


class Anything(type):
    """A class that stands for whatever a stubbed module would define: also called, subscripted or
    asked for an attribute.
    """

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __getitem__(cls, _):
        return cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class Stub(types.ModuleType):
    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Before all other finders: empty packages for SGLang's parents (their __init__ would import
    everything), stubs for its other modules.

    `last`: after all others, stubs for packages that are not installed.
    """

    def __init__(self, last):
        self.last = last

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if self.last:
            return (
                importlib.machinery.ModuleSpec(name, self, is_package=True)
                if top in ("torch", "zmq", "PIL", "pybase64", "triton", "sgl_kernel")
                else None
            )
        if top != "sglang" or any(name == real or name.startswith(real + ".") for real in REAL):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = Stub(spec.name)
        if spec.name in PACKAGES:
            root = importlib.machinery.PathFinder.find_spec("sglang").submodule_search_locations[0]
            module.__path__ = [root + "/" + "/".join(spec.name.split(".")[1:])]
        return module

    def exec_module(self, module):
        pass


def main():
    sys.meta_path.insert(0, Stubs(last=False))
    sys.meta_path.append(Stubs(last=True))
    import pydantic

    io_struct = importlib.import_module(
        "sglang.srt.managers.io_struct"
    )  # `from ... import` would take the stub's attribute
    from sglang.srt.sampling.sampling_params import SamplingParams

    try:
        from sglang.srt.entrypoints.api_contract import generate_contract_error
    except ImportError:  # older versions have no such gate
        generate_contract_error = None
    results = []
    for route, body in json.load(sys.stdin):
        cls = getattr(io_struct, CLASSES[route], None)
        if cls is None:
            results.append({"route": route, "absent": True})
            continue
        fields = (
            {field.name for field in dataclasses.fields(cls)}
            if dataclasses.is_dataclass(cls)
            else set(cls.__struct_fields__)
        )
        cls.__pydantic_config__ = (
            {"arbitrary_types_allowed": True} if dataclasses.is_dataclass(cls) else {}
        )
        parsed = (
            pydantic.TypeAdapter(cls).validate_json(json.dumps(body))
            if route != "/generate"
            else cls(**body)
        )
        result = {
            "route": route,
            "unknown": sorted(body.keys() - fields),
            "values": {name: getattr(parsed, name) for name in body.keys() & fields},
        }
        if route == "/generate":
            parsed.normalize_batch_and_arguments()
            params = SamplingParams(**parsed.sampling_params)
            params.verify(vocab_size=1000)
            result["sampling"] = {
                name: getattr(params, name)
                for name in (
                    "max_new_tokens",
                    "temperature",
                    "top_p",
                    "min_p",
                    "sampling_seed",
                    "no_stop_trim",
                )
            }
            result["contract"] = generate_contract_error(body) if generate_contract_error else None
            result["values"] |= {"is_single": parsed.is_single}
        results.append(result)
    print(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
