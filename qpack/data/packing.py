"""Which sequences share one forward pass: best-fit decreasing, as TRL packs.

Every sequence, the longest first, goes where the least room is left that holds it, so that what remains open is the
long room. Sequences are never cut. O(n log capacity): the open sequences are kept by the room they have left, and a
tree over all rooms finds the smallest that is large enough.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return indices into ``lengths``, grouped so that no group is longer than ``capacity``.

    The same lengths give the same groups: among equal lengths the first comes first, among equal rooms the last opened.

    Raises:
        ValueError: a length is more than the capacity, or less than 1.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths[{index}]: expected 1 to {capacity}, found {length}")
    groups: list[list[int]] = []
    rooms = _Rooms(capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = rooms.smallest(lengths[index])
        if room is None:
            group, room = len(groups), capacity
            groups.append([])
        else:
            group = rooms.take(room)
        groups[group].append(index)
        if room > lengths[index]:
            rooms.put(room - lengths[index], group)
    return groups


class _Rooms:
    """Groups by the room left in them; a node of the tree is the largest room below it that some group has."""

    def __init__(self, capacity: int) -> None:
        self._leaves = 1 << capacity.bit_length()
        self._largest = [0] * (2 * self._leaves)
        self._groups: list[list[int]] = [[] for _ in range(capacity)]

    def smallest(self, length: int) -> int | None:
        """Return the smallest room of at least ``length``."""
        if self._largest[1] < length:
            return None
        node = self._leaves + length
        if not self._largest[node]:
            # Up until a right neighbour holds something, then down its left edge.
            while node % 2 or not self._largest[node + 1]:
                node //= 2
            node += 1
            while node < self._leaves:
                node = 2 * node if self._largest[2 * node] else 2 * node + 1
        return node - self._leaves

    def take(self, room: int) -> int:
        """Remove and return the group last put there."""
        group = self._groups[room].pop()
        if not self._groups[room]:
            self._set(room, 0)
        return group

    def put(self, room: int, group: int) -> None:
        self._groups[room].append(group)
        self._set(room, room)

    def _set(self, room: int, value: int) -> None:
        node = self._leaves + room
        self._largest[node] = value
        while node > 1:
            node //= 2
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])
