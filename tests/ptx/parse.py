"""PTX as text, read into instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction of a module."""

    text: str
    guard: str = ""  # the predicate that it needs, "" for none
    negated: bool = False
    name: str = ""  # such as ld.global.v4.f32
    operands: tuple[str, ...] = ()
    used: int = -1  # of a load: a bit for each byte that is not padding

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.name.split(".")[1:])


class Parameter(NamedTuple):
    """Of a function, in the space .param."""

    name: str
    size: int
    alignment: int


class Function(NamedTuple):
    """A kernel or a function that kernels call. Its code ends before that of the next one."""

    name: str
    entry: bool
    parameters: tuple[Parameter, ...]
    result: str  # the parameter that holds what it returns, "" for none
    registers: dict[str, int]  # bytes of a register by its name, or by what is before its number; 0: a predicate
    start: int  # of its code in the module's
    labels: dict[str, int]  # places in the module's code


class Module(NamedTuple):
    """What one compilation gave. Shared memory is dynamic: one array, of a size that the launch gives."""

    code: tuple[Instruction, ...]
    functions: dict[str, Function]
    shared: str  # the array's name, "" for none

    def function_at(self, place: int) -> Function:
        return max((f for f in self.functions.values() if f.start <= place), key=lambda f: f.start)

    def entry(self, suffix: str = "") -> Function:
        """The one kernel whose name ends like this."""
        (found,) = (f for f in self.functions.values() if f.entry and f.name.endswith(suffix))
        return found

    def places(self, function: Function, name: str) -> list[int]:
        """Where instructions of a function begin like this."""
        end = min((f.start for f in self.functions.values() if f.start > function.start), default=len(self.code))
        return [i for i in range(function.start, end) if self.code[i].name.startswith(name)]

    def without(self, *places: int) -> Module:
        """The same module, with nothing at some places of its code."""
        code = list(self.code)
        for place in places:
            code[place] = Instruction("nothing", name="nothing")
        return self._replace(code=tuple(code))


_FUNCTION = re.compile(
    r"(?:\.visible\s+|\.weak\s+)?\.(entry|func)\s+(?:\((.*?)\)\s*)?([\w$]+)\s*\((.*?)\)([^{;]*)([{;])", re.DOTALL
)
_WIDTH = re.compile(r"\.(?:[usbf](\d+)|(pred))\b")


def split(text: str) -> tuple[str, ...]:
    """At the commas that no bracket encloses."""
    return tuple(part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", text) if part.strip())


def vector(operand: str) -> tuple[str, ...]:
    """The operands in braces, or the one that is there."""
    return split(operand.strip("{} ")) if operand.startswith("{") else (operand,)


def _parameter(text: str) -> Parameter:
    if array := re.search(r"\.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
        return Parameter(array[2], int(array[3]), int(array[1]))
    width = int(_WIDTH.search(text)[1]) // 8  # type: ignore[index]
    return Parameter(text.split()[-1], width, width)


def _statements(body: str) -> Iterator[str]:
    """Labels, with a colon, and what semicolons end; braces of scopes are left out, those of operands stay."""
    for piece in re.split(r";|(?<=:)\s*\n|(?:^|(?<=\n)|(?<=;))\s*[{}]", body):
        text = " ".join(piece.split()).lstrip("{ ")
        while label := re.match(r"([\w$.]+):(?!:)\s*", text):
            yield label[1] + ":"
            text = text[label.end() :]
        if text and text != "}":
            yield text.lstrip("} ")


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
    assert found, text
    operands = split(found[4])
    if found[3].startswith("call"):
        result = operands[0].strip("() ") if operands[0].startswith("(") else ""
        callee, *given = operands[1:] if operands[0].startswith("(") else operands
        operands = (callee, result, *(split(given[0].strip("() ")) if given else ()))
    return Instruction(text, found[2] or "", bool(found[1]), found[3], operands)


def parse(text: str) -> Module:
    """Reads a module. A call is two instructions: the jump, and the copy of what was returned."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\.(?:loc|file|section)\b.*$", "", text, flags=re.MULTILINE)  # no semicolon ends these
    shared = re.search(r"\.extern \.shared .*?([\w$]+)\[\]", text)
    code: list[Instruction] = []
    functions: dict[str, Function] = {}
    at = 0
    while found := _FUNCTION.search(text, at):
        at = found.end()
        if found[6] == ";":
            continue
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        registers: dict[str, int] = {}
        labels: dict[str, int] = {}
        start, used = len(code), -1
        for each in _statements(text[found.end() : at - 1]):
            if each.endswith(":"):
                labels[each[:-1]] = len(code)
            elif each.startswith(".reg"):
                width = int(_WIDTH.search(each)[1] or 0) // 8  # type: ignore[index]
                for name in each.split(None, 2)[2].split(","):
                    registers[name.partition("<")[0].strip()] = width
            elif mask := re.match(r'\.pragma "used_bytes_mask (\w+)"', each):
                used = int(mask[1], 0)  # of the next load
            elif not each.startswith("."):
                code.append(_instruction(each)._replace(used=used))
                used = -1
                if code[-1].opcode == "call":
                    code.append(code[-1]._replace(name="returned"))
        code.append(Instruction("the end of a function", name="ret"))
        parameters = tuple(_parameter(each) for each in split(found[4]))
        result = found[2].split()[-1] if found[2] else ""
        functions[found[3]] = Function(found[3], found[1] == "entry", parameters, result, registers, start, labels)
    return Module(tuple(code), functions, shared[1] if shared else "")
