"""Paths through a maze, and the controllers that follow them.

S = 4 entries of a state (x, y in m; vx, vy in m/s). This module does not know what is recorded, nor what it is for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

Cell: TypeAlias = tuple[int, int]
"""Row and column of a maze's map, counted from its upper left corner."""
Position: TypeAlias = tuple[float, float]
"""x and y in metres; the map's centre is the origin and a cell is 1 m wide."""
Policy: TypeAlias = Callable[[Sequence[float]], Sequence[float]]
"""State (x, y, vx, vy) -> force, to which noise is added; the environment clips the sum."""
Controller: TypeAlias = "Callable[[Navigator, Sequence[float], Position, np.random.Generator], Policy]"
"""Maze, state, goal, random numbers -> the policy that pursues this goal from there on."""

POSITION_GAIN, VELOCITY_GAIN = 10.0, -1.0
"""Force per metre to the way-point and per m/s: D4RL's. Stronger damping only lowered the reference score."""
TURN_RADIUS, JITTER = 0.1, 0.2
"""Metres from a way-point within which Minari's controller turns to the next, and by which it moves them at most."""
BREADTH_FIRST_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
DEPTH_FIRST_MOVES = ((0, 1), (0, -1), (-1, 0), (1, 0))
"""Rows and columns from a cell to its neighbours, in the order in which the searches look; the second is Minari's."""


class Navigator:
    """The cells of a maze and the paths between them.

    Args:
        maze_map: rows of cells, 1 = wall, all else free (as in `gymnasium_robotics.envs.maze.maps`).
    """

    def __init__(self, maze_map: Sequence[Sequence[int | str]]) -> None:
        self.num_rows, self.num_columns = len(maze_map), len(maze_map[0])
        self.free_cells = frozenset(
            (row, column) for row, line in enumerate(maze_map) for column, cell in enumerate(line) if cell != 1
        )
        self._next_cells = {goal: self._search(goal) for goal in self.free_cells}
        self._cells_before = {start: self._search(start, depth_first=True) for start in self.free_cells}

    def centre(self, cell: Cell) -> Position:
        """Return the centre of a cell."""
        return cell[1] + 0.5 - self.num_columns / 2, self.num_rows / 2 - cell[0] - 0.5

    def cell(self, position: Sequence[float]) -> Cell:
        """Return the cell around a position; more numbers may follow it, as in a state."""
        return math.floor(self.num_rows / 2 - position[1]), math.floor(position[0] + self.num_columns / 2)

    def next_cell(self, cell: Cell, goal: Cell) -> Cell:
        """Return the cell after `cell` on a shortest path to `goal`; after the goal or a wall it is the goal."""
        return self._next_cells[goal].get(cell, goal)

    def depth_first_path(self, start: Cell, goal: Cell) -> list[Cell]:
        """Return the cells after the start's on a path to the goal, as a depth-first search finds it: with detours."""
        path, cell = [], goal
        while cell != start:
            path.append(cell)
            cell = self._cells_before[start][cell]
        return path[::-1]

    def _search(self, root: Cell, *, depth_first: bool = False) -> dict[Cell, Cell]:
        """Return of each cell the one from which it was found; breadth first, it is the next on a way to the root."""
        moves = DEPTH_FIRST_MOVES if depth_first else BREADTH_FIRST_MOVES
        found_from, waiting = {root: root}, deque([root])
        while waiting:
            row, column = cell = waiting.pop() if depth_first else waiting.popleft()
            for down, right in moves:
                near = row + down, column + right
                if near in self.free_cells and near not in found_from:
                    found_from[near] = cell
                    waiting.append(near)
        return found_from


def steer_shortest(navigator: Navigator, _: Sequence[float], goal: Position, __: np.random.Generator) -> Policy:
    """Follow a shortest path without memory of the way; the force is clipped to -1..1.

    The way-point is the centre of the next cell, or the goal where that cell is the goal's. Two cells that share a side
    are a rectangle without a wall in it, so the straight line to the way-point is always free.
    """
    goal_cell = navigator.cell(goal)

    def steer(state: Sequence[float]) -> Sequence[float]:
        cell = navigator.next_cell(navigator.cell(state), goal_cell)
        force_x, force_y = _pull(goal if cell == goal_cell else navigator.centre(cell), state)
        return min(max(force_x, -1.0), 1.0), min(max(force_y, -1.0), 1.0)

    return steer


def steer_depth_first(
    navigator: Navigator, start: Sequence[float], goal: Position, random: np.random.Generator
) -> Policy:
    """Follow a depth-first path; the force is not clipped.

    As Farama's minari-dataset-generation-scripts do, which never ask for the QIteration that their metadata name. They
    turn to the next way-point within TURN_RADIUS of the last. These are the centres of the path's cells, all but the
    first moved by up to JITTER towards lower x and y, and then the goal; but of a single cell it is the centre.
    """
    path = navigator.depth_first_path(navigator.cell(start), navigator.cell(goal))
    centres = [navigator.centre(cell) for cell in path]
    jitter = random.uniform(high=JITTER, size=(len(path), 2)).tolist()
    moved = [(x - dx, y - dy) for (x, y), (dx, dy) in zip(centres, jitter, strict=True)]
    ahead = iter(centres if len(path) == 1 else [*centres[:1], *moved[1:-1], goal])
    way_point = next(ahead)

    def steer(state: Sequence[float]) -> Sequence[float]:
        nonlocal way_point
        if math.hypot(way_point[0] - state[0], way_point[1] - state[1]) <= TURN_RADIUS:
            way_point = next(ahead, way_point)
        return _pull(way_point, state)

    return steer


def wander(_: Navigator, __: Sequence[float], ___: Position, random: np.random.Generator) -> Policy:
    """Push in uniform random directions."""
    return lambda _: random.uniform(-1.0, 1.0, 2).tolist()


def _pull(way_point: Position, state: Sequence[float]) -> Sequence[float]:
    """Return the PD controller's force."""
    return (
        POSITION_GAIN * (way_point[0] - state[0]) + VELOCITY_GAIN * state[2],
        POSITION_GAIN * (way_point[1] - state[1]) + VELOCITY_GAIN * state[3],
    )
