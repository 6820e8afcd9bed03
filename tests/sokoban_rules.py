"""Sokoban by its rules, apart from reasoning-gym's code."""

MOVES = {"L": (0, -1), "R": (0, 1), "U": (-1, 0), "D": (1, 0)}


class Board:
    """A position, as sets of places."""

    def __init__(self, text: str) -> None:
        self.rows = [row.split() for row in text.strip().splitlines()]
        at = {(i, j): char for i, row in enumerate(self.rows) for j, char in enumerate(row)}
        self.walls, self.goals, self.boxes, (self.player,) = (
            {place for place, char in at.items() if char in chars} for chars in ("+", "X%$", "@$", "*%")
        )

    def move(self, word: str) -> None:
        for down, right in map(MOVES.__getitem__, word):
            place = (self.player[0] + down, self.player[1] + right)
            behind = (place[0] + down, place[1] + right)
            if place in self.walls or (place in self.boxes and behind in self.walls | self.boxes):
                continue
            if place in self.boxes:
                self.boxes = self.boxes - {place} | {behind}
            self.player = place

    @property
    def solved(self) -> bool:
        return self.boxes <= self.goals

    def __str__(self) -> str:
        def char(place: tuple[int, int]) -> str:
            if place in self.walls:
                return "+"
            on_goal = place in self.goals
            return "*%"[on_goal] if place == self.player else "@$"[on_goal] if place in self.boxes else "-X"[on_goal]

        rows = [" ".join(char((i, j)) for j in range(len(row))) for i, row in enumerate(self.rows)]
        return "\n" + "\n".join(rows) + "\n"
