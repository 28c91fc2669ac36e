"""From Python functions to machine code that needs neither Python nor numba to run.

A loop's arguments are integers of 64 bits, addresses among them, and so is its result. It allocates nothing: its working
memory is on the stack, where a compiler knows that nothing else lies, and what it writes is its caller's.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from merging.methods.loops import FULL, HALF

SETTINGS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""Of the liberties that a compiler may take, only that of not rounding between a product and a sum."""
FROM_OUTSIDE = frozenset({"memset", "memcpy", "memmove"})
"""What machine code may ask of the process that loads it."""
ALIGNED = 64
LANES = 32
"""Entries that `lanes_beyond` looks at."""

intrinsic: Callable[..., Callable[..., Any]] = _intrinsic
"""What the loops call is not what is decorated: the types of the arguments come first there."""

Function = TypeVar("Function", bound=Callable[..., Any])


def inner(function: Function) -> Function:
    """A function of which every loop that calls it has a copy, made for its place."""
    return cast(Function, njit(forceinline=True, **SETTINGS)(function))


def inner_sums(function: Function) -> Function:
    """The same where sums may be taken in any order, which is that of a processor's lanes."""
    return cast(Function, njit(forceinline=True, **{**SETTINGS, "fastmath": {"contract", "reassoc"}})(function))


def pointer_to(element: Any) -> Any:
    """From an address, which numba takes for a number, to what it takes for an array's begin."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate  # type: ignore[no-untyped-call]

    return pointer


def room_for(element: Any, count: int) -> Any:
    """Working memory for so many elements, with unknown content, until the loop returns."""

    @intrinsic
    def room(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # an array and not many single places: LLVM cuts nothing of it off
            place = cgutils.alloca_once(builder, ir.ArrayType(context.get_value_type(element), count))  # type: ignore[no-untyped-call]
            place.align = ALIGNED
            return builder.bitcast(place, context.get_value_type(signature.return_type))

        return types.CPointer(element)(), generate  # type: ignore[no-untyped-call]

    return room


@intrinsic
def from_float16(typing: Any, bits: Any) -> Any:
    """The float32 that 16 bits mean as a float16, by the processor's own instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def to_float16(typing: Any, value: Any) -> Any:
    """The bits of the float16 nearest to a float32, and the even one of two as near."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


def lanes_beyond(kind: int) -> Any:
    """What looks at LANES task-vector entries of one kind of row at once.

    It takes a row, θ_0 in float32, the first of the entries, and bit patterns `least` and `most`. It gives 64 bits: one of
    the lower half for every entry whose magnitude's bits are above `least`, of the upper half where above `most`.
    """
    full, singles = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.FloatType(), LANES)
    sixteen, halves = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.HalfType(), LANES)

    def everywhere(builder: Any, value: Any) -> Any:
        one = builder.insert_element(ir.Constant(full, ir.Undefined), value, ir.IntType(32)(0))
        return builder.shuffle_vector(one, one, ir.Constant(full, [0] * LANES))

    @intrinsic
    def beyond(typing: Any, row: Any, before: Any, first: Any, least: Any, most: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def load(number: int, vector: Any, align: int) -> Any:
                array = context.make_array(signature.args[number])(context, builder, arguments[number])
                place = builder.bitcast(builder.gep(array.data, [arguments[2]]), vector.as_pointer())
                values = builder.load(place)
                values.align = align
                return values

            if kind == FULL:
                wide = load(0, singles, 4)
            elif kind == HALF:
                wide = builder.fpext(load(0, halves, 2), singles)
            else:
                upper = builder.zext(load(0, sixteen, 2), full)
                wide = builder.bitcast(builder.shl(upper, ir.Constant(full, [16] * LANES)), singles)
            bits = builder.bitcast(builder.fsub(wide, load(1, singles, 4)), full)
            bits = builder.and_(bits, ir.Constant(full, [0x7FFFFFFF] * LANES))
            found = []
            for limit in arguments[3:]:
                above = builder.icmp_signed(">", bits, everywhere(builder, limit))
                found.append(builder.zext(builder.bitcast(above, ir.IntType(LANES)), ir.IntType(64)))
            return builder.or_(found[0], builder.shl(found[1], ir.IntType(64)(LANES)))

        return types.int64(row, before, types.int64, types.int32, types.int32), generate

    return beyond


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Has the processor bring what lies at an address to its first cache, and goes on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(ask, [builder.inttoptr(arguments[0], byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def ones(typing: Any, bits: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@intrinsic
def lowest(typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


def machine_code(function: Callable[..., int], target: llvm.TargetMachine) -> tuple[str, bytes]:
    """Compiles a loop.

    Args:
        function: Its source; it may call what is `inner`, and functions of its own arguments only.
        target: The processor.

    Returns:
        The name by which the code is found, and an object file.

    Raises:
        RuntimeError: The code would ask for what only numba has (memory, an exception): the function is no loop.
    """
    numbers = len(inspect.signature(function).parameters)
    compiled = cfunc(types.int64(*[types.int64] * numbers), **SETTINGS)(function)
    module = llvm.parse_assembly(compiled.inspect_llvm())
    for f in module.functions:
        if not f.is_declaration and f.name != compiled.native_name:
            f.linkage = "internal"  # then LLVM sees that no error comes back, and drops what numba would do about it
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    asked = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if strange := asked - FROM_OUTSIDE:
        raise RuntimeError(f"the loop '{function.__name__}' would ask the process for {', '.join(sorted(strange))}")
    return compiled.native_name, target.emit_object(module)
