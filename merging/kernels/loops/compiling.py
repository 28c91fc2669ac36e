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

from merging.kernels.loops import FLOAT16, FLOAT32

SETTINGS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""Of the liberties that a compiler may take, only that of not rounding between a product and a sum."""
FROM_OUTSIDE = frozenset({"memset", "memcpy", "memmove"})
"""What machine code may ask of the process that loads it."""
ALIGNED = 64
PAST = 16
"""Entries that `nontemporal_store` writes: what a cache takes at once."""
LANES = 32
"""Entries that are looked at or added up at once."""

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


def stack_array(element: Any, count: int) -> Any:
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


_FULL, _SINGLES = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.FloatType(), LANES)
_SIXTEEN, _HALVES = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.HalfType(), LANES)


def _everywhere(builder: Any, value: Any) -> Any:
    """A number in every lane."""
    lanes = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(_FULL, [0] * LANES))


def _load(builder: Any, place: Any, vector: Any, align: int) -> Any:
    """LANES numbers, of one of the types above, from a pointer."""
    values = builder.load(builder.bitcast(place, vector.as_pointer()))
    values.align = align
    return values


def _wide(builder: Any, place: Any, kind: int) -> Any:
    """LANES entries of a kind of row, from a pointer to the first, in float32."""
    if kind == FLOAT32:
        return _load(builder, place, _SINGLES, 4)
    if kind == FLOAT16:
        return builder.fpext(_load(builder, place, _HALVES, 2), _SINGLES)
    upper = builder.zext(_load(builder, place, _SIXTEEN, 2), _FULL)
    return builder.bitcast(builder.shl(upper, ir.Constant(_FULL, [16] * LANES)), _SINGLES)


def lanes_beyond(kind: int) -> Any:
    """What looks at LANES task-vector entries of one kind of row at once.

    It takes a row, θ_0 in float32, the first of the entries, and bit patterns `least` and `most`. It gives 64 bits: one of
    the lower half for every entry whose magnitude's bits are above `least`, of the upper half where above `most`.
    """

    @intrinsic
    def beyond(typing: Any, row: Any, before: Any, first: Any, least: Any, most: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at, base = (
                builder.gep(context.make_array(signature.args[n])(context, builder, arguments[n]).data, [arguments[2]])
                for n in range(2)
            )
            moved = builder.fsub(_wide(builder, at, kind), _load(builder, base, _SINGLES, 4))
            bits = builder.and_(builder.bitcast(moved, _FULL), ir.Constant(_FULL, [0x7FFFFFFF] * LANES))
            masks = []
            for limit in arguments[3:]:
                above = builder.icmp_signed(">", bits, _everywhere(builder, limit))
                masks.append(builder.zext(builder.bitcast(above, ir.IntType(LANES)), ir.IntType(64)))
            return builder.or_(masks[0], builder.shl(masks[1], ir.IntType(64)(LANES)))

        return types.int64(row, before, types.int64, types.int32, types.int32), generate

    return beyond


def lanes_sum(kind: int) -> Any:
    """What writes Σ c_i x_i of LANES entries of rows of one kind, from one pass over all rows.

    It takes the rows' addresses, c, how many rows, the number of the first entry, and where to write in a float32 row. The
    terms are added one after the other, product and sum with one rounding, as the compiled loops do it, too.
    """
    width = 4 if kind == FLOAT32 else 2

    @intrinsic
    def add(typing: Any, rows: Any, factors: Any, count: Any, start: Any, work: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            addresses, c, room = (
                context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 1, 4)
            )
            _, _, number, start, _, to = arguments
            kinds = ir.FunctionType(_SINGLES, [_SINGLES] * 3)
            multiply_add = cgutils.get_or_insert_function(builder.module, kinds, f"llvm.fma.v{LANES}f32")  # type: ignore[no-untyped-call]
            total = cgutils.alloca_once(builder, _SINGLES)  # type: ignore[no-untyped-call]
            builder.store(ir.Constant(_SINGLES, [0.0] * LANES), total)
            with cgutils.for_range(builder, number) as loop:
                begin = builder.load(builder.gep(addresses, [loop.index]))
                place = builder.inttoptr(
                    builder.add(begin, builder.mul(start, start.type(width))), ir.IntType(8).as_pointer()
                )
                factor = _everywhere(builder, builder.load(builder.gep(c, [loop.index])))
                builder.store(
                    builder.call(multiply_add, [_wide(builder, place, kind), factor, builder.load(total)]), total
                )
            done = builder.store(builder.load(total), builder.bitcast(builder.gep(room, [to]), _SINGLES.as_pointer()))
            done.align = 4
            return context.get_dummy_value()

        return types.void(rows, factors, types.int64, types.int64, work, types.int64), generate

    return add


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
def nontemporal_store(typing: Any, address: Any, row: Any, first: Any) -> Any:
    """Writes PAST float32 entries of a row, from `first` on, to an address of as many bytes' multiple, not by a cache.

    The processor need not read there first what is overwritten, which a cache would.
    """
    lanes = ir.VectorType(ir.FloatType(), PAST)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[1])(context, builder, arguments[1])
        values = builder.load(builder.bitcast(builder.gep(array.data, [arguments[2]]), lanes.as_pointer()))
        values.align = 4
        done = builder.store(values, builder.inttoptr(arguments[0], lanes.as_pointer()))
        done.align = 4 * PAST
        done.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, row, types.int64), generate


@intrinsic
def store_fence(typing: Any) -> Any:
    """Has whoever is told that a loop is done see all that `nontemporal_store` wrote."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def popcount(typing: Any, bits: Any) -> Any:
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
    declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if strange := declared - FROM_OUTSIDE:
        raise RuntimeError(f"the loop '{function.__name__}' would ask the process for {', '.join(sorted(strange))}")
    return compiled.native_name, target.emit_object(module)
