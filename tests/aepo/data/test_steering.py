"""Paths and controllers against searches of another kind, and against the simulator."""

import itertools

import gymnasium
import gymnasium_robotics
import numpy as np
import pytest
from gymnasium_robotics.envs.maze import maps
from scipy.sparse.csgraph import shortest_path

from aepo.data.pointmaze import (
    GOAL_CELLS,
)
from aepo.data.steering import Navigator, steer_depth_first, steer_shortest

gymnasium.register_envs(gymnasium_robotics)

HORIZON = 50
POINTMAZES = [task for task in GOAL_CELLS if task.startswith("pointmaze")]
DENSE = [task for task in POINTMAZES if task.endswith("dense")]

MAPS = {
    "PointMaze_Open-v3": maps.OPEN,
    "PointMaze_UMaze-v3": maps.U_MAZE,
    "PointMaze_Medium-v3": maps.MEDIUM_MAZE,
    "PointMaze_Large-v3": maps.LARGE_MAZE,
}


def free_cells(maze_map):
    return [(i, j) for i, line in enumerate(maze_map) for j, cell in enumerate(line) if cell != 1]


def distances(maze_map):
    """Steps between all free cells, by Floyd and Warshall on the graph of cells that share a side."""
    cells = np.array(free_cells(maze_map))
    return shortest_path(np.abs(cells[:, None] - cells[None]).sum(-1) == 1, method="FW", unweighted=True)


@pytest.mark.parametrize("maze_map", MAPS.values(), ids=MAPS)
def test_paths_are_as_short_as_floyd_and_warshall_find_them(maze_map):
    navigator, cells, distance = Navigator(maze_map), free_cells(maze_map), distances(maze_map)
    for (i, start), (j, goal) in itertools.product(enumerate(cells), repeat=2):
        cell, length = start, 0
        while cell != goal:
            following = navigator.next_cell(cell, goal)
            assert following in cells
            assert abs(following[0] - cell[0]) + abs(following[1] - cell[1]) == 1
            cell, length = following, length + 1
        assert length == distance[i, j]
        assert navigator.next_cell((0, 0), goal) == goal


@pytest.mark.parametrize("maze_map", MAPS.values(), ids=MAPS)
def test_depth_first_paths_are_those_of_a_search_that_stops_at_the_goal(maze_map):
    navigator, cells = Navigator(maze_map), free_cells(maze_map)
    for start, goal in itertools.product(cells, repeat=2):
        stack, came_from = [start], {start: None}
        while (cell := stack.pop()) != goal:
            for down, right in ((0, 1), (0, -1), (-1, 0), (1, 0)):
                near = cell[0] + down, cell[1] + right
                if near in cells and near not in came_from:
                    stack.append(near)
                    came_from[near] = cell
        path = []
        while cell != start:
            path.insert(0, cell)
            cell = came_from[cell]
        assert navigator.depth_first_path(start, goal) == path


def test_a_depth_first_path_takes_detours():
    # drawn by hand: down along the wall, up again in the third column, and so on; 6 steps would do
    path = [(2, 1), (3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 4), (1, 5), (2, 5), (3, 5)]
    assert Navigator(maps.OPEN).depth_first_path((1, 1), (3, 5)) == path


@pytest.mark.parametrize("env_id", MAPS)
def test_cells_lie_where_the_environment_has_them(env_id):
    env = gymnasium.make(env_id)
    maze, navigator = env.unwrapped.maze, Navigator(MAPS[env_id])
    assert maze.maze_map == MAPS[env_id]
    for cell in free_cells(MAPS[env_id]):
        assert navigator.centre(cell) == pytest.approx(maze.cell_rowcol_to_xy(np.array(cell)))
    for x, y in np.random.default_rng(0).uniform(-2.4, 2.4, (50, 2)):
        assert navigator.cell((x, y, 7.0, 7.0)) == navigator.cell((x, y))
        assert navigator.cell((x, y)) == tuple(maze.cell_xy_to_rowcol(np.array([x, y])))
    env.close()


@pytest.mark.parametrize("env_id", MAPS)
@pytest.mark.parametrize("controller", [steer_shortest, steer_depth_first])
def test_the_noiseless_controller_crosses_the_maze(controller, env_id):
    cells, distance = free_cells(MAPS[env_id]), distances(MAPS[env_id])
    start, goal = (cells[i] for i in np.unravel_index(distance.argmax(), distance.shape))
    env, navigator = gymnasium.make(env_id, reset_target=False), Navigator(MAPS[env_id])
    observation, _ = env.reset(seed=0, options={"reset_cell": np.array(start), "goal_cell": np.array(goal)})
    policy = controller(
        navigator, observation["observation"], tuple(observation["desired_goal"]), np.random.default_rng(0)
    )
    if controller is steer_shortest:
        num_steps = 40 * int(distance.max())  # 40 steps of 10 ms for each cell of 1 m
    else:
        num_steps = 60 * len(navigator.depth_first_path(start, goal))  # it brakes at each
    for _ in range(num_steps):
        action = np.array(policy(observation["observation"]), dtype=np.float32)
        observation, _, _, _, info = env.unwrapped.step(action)
        if info["success"]:
            break
    assert info["success"]
    env.close()


def test_the_shortest_way_has_forces_within_the_action_space_and_no_memory():
    navigator, random = Navigator(maps.U_MAZE), np.random.default_rng(0)
    steer = steer_shortest(navigator, (), (-0.8, 1.1), random)
    assert steer((1.3, -0.7, 0.0, 0.0)) == (pytest.approx(-1.0), 1.0)  # to the cell above, at (1, 0)
    assert steer((1.03, -0.02, 0.1, -0.2)) == (pytest.approx(-0.4), 1.0)  # of which the next is at (1, 1)
    assert steer((-0.82, 1.05, 0.1, 0.0)) == pytest.approx((0.1, 0.5))  # to the goal
    assert steer((1.3, -0.7, 0.0, 0.0)) == (pytest.approx(-1.0), 1.0)
    assert random.random() == np.random.default_rng(0).random()  # has drawn nothing


@pytest.mark.parametrize("start", [(1, 1), (2, 4), (3, 5)])
@pytest.mark.parametrize("goal", [(1, 1), (2, 3), (3, 5)])
def test_depth_first_way_points_are_cells_slightly_moved_and_then_the_goal(start, goal):
    navigator = Navigator(maps.OPEN)
    goal_position = np.add(navigator.centre(goal), (0.2, -0.1))
    path = navigator.depth_first_path(start, goal)
    ball = np.add(navigator.centre(start), (-0.3, 0.4))
    steer, seen = steer_depth_first(navigator, ball, tuple(goal_position), np.random.default_rng(0)), []
    for _ in path or [goal]:
        way_point = ball + np.array(steer((*ball, 0.0, 0.0))) / 10  # the force is not clipped
        seen.append(way_point)
        assert np.subtract(steer((*ball, 3.0, -4.0)), steer((*ball, 0.0, 0.0))) == pytest.approx((-3.0, 4.0))
        for metres in (2.0, 0.101):  # too far away to turn
            x, y = way_point - (metres, 0.0)
            assert steer((x, y, 0.0, 0.0)) == pytest.approx((10 * metres, 0.0))
        ball = np.add(way_point, (0.0, 0.099))
    assert ball + np.array(steer((*ball, 0.0, 0.0))) / 10 == pytest.approx(seen[-1])  # there it stays
    if path:
        assert seen[0] == pytest.approx(navigator.centre(path[0]))
    if len(path) != 1:  # of a goal in the next cell it is that cell's centre
        assert seen[-1] == pytest.approx(goal_position)
    moved = [np.array(navigator.centre(cell)) - at for cell, at in zip(path[1:-1], seen[1:-1], strict=True)]
    assert all(((by > -1e-9) & (by < 0.2)).all() for by in moved)
    assert len({tuple(by) for by in moved}) == len(moved)
