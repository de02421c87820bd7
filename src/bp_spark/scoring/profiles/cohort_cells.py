"""What a cohort did by age, without a figure that tells of few users."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """Figures of a cohort at one age; ``None`` where one would tell of few users.

    Attributes:
        age: Periods since the first purchase.
        active_users: Users with an order in the period.
        orders: Their orders.
        cents: Spend of the period.
        cumulative_cents: Spend up to the end of the period.
    """

    age: int
    active_users: int | None
    orders: int | None
    cents: int | None
    cumulative_cents: int | None


@dataclass
class Cells:
    """Sums of one cohort by age.

    Attributes:
        last_age: The newest age, which holds all that came after the complete periods.
        active_users: Age -> users with an order.
        orders: Age -> orders.
        cents: Age -> spend.
        users: Age -> earlier age -> users with an order or a refund at the age, and the last one before it at the earlier
            age, -1 for none. They say how many users any span of ages tells of.
    """

    last_age: int
    active_users: Counter[int] = field(default_factory=Counter)
    orders: Counter[int] = field(default_factory=Counter)
    cents: Counter[int] = field(default_factory=Counter)
    users: defaultdict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, age: int, earlier_age: int, *, users: int, active_users: int, orders: int, cents: int) -> None:
        """Add the sums of users with an order or a refund at an age and the last one before it at an earlier age."""
        self.active_users[age] += active_users
        self.orders[age] += orders
        self.cents[age] += cents
        self.users[age][earlier_age] += users

    def published(self, users: int, least_users: int) -> list[Published]:
        """Return the figures by age, the youngest first.

        No figure tells of 1 to ``least_users - 1`` users, and neither does the difference of two figures:

        * ``active_users`` is withheld where the active users or the others are few.
        * ``orders`` is withheld where the active users are few.
        * ``cumulative_cents`` is withheld until at least so many users had an order or a refund since the age where it was
          last published. If they are few at the end, the last such ages are withheld, too, because the newest one is always
          published (complementary suppression; Hundepool et al. 2012, "Statistical Disclosure Control", 4.3).
        * ``cents`` is withheld where it isn't the difference of two published sums.

        Args:
            users: Users of the cohort, at least ``least_users``.
            least_users: Least users that a figure tells of.
        """
        shown = set(self._published_sums(least_users))
        rows, cumulative = [], 0
        for age in range(self.last_age + 1):
            active = self.active_users[age]
            is_large = active == 0 or active >= least_users
            rest_is_large = active == users or users - active >= least_users
            cumulative += self.cents[age]
            rows.append(
                Published(
                    age,
                    active_users=active if is_large and rest_is_large else None,
                    orders=self.orders[age] if is_large else None,
                    cents=self.cents[age] if {age - 1, age} <= shown else None,
                    cumulative_cents=cumulative if age in shown else None,
                )
            )
        return rows

    def _published_sums(self, least_users: int) -> Sequence[int]:
        """Return the ages whose cumulative spend is published, with -1 for that before the first purchase."""
        shown = [-1]
        for age in range(self.last_age + 1):
            new_users = self._users_between(shown[-1], age)
            if new_users >= least_users or (new_users == 0 and shown[-1] == age - 1):
                shown.append(age)
        while shown[-1] != self.last_age and self._users_between(shown[-1], self.last_age) < least_users:
            shown.pop()
        return [*shown, self.last_age]

    def _users_between(self, shown_age: int, age: int) -> int:
        """Return the users with an order or a refund after an age, up to another one; each counts once."""
        return sum(
            users
            for at in range(shown_age + 1, age + 1)
            for earlier_age, users in self.users[at].items()
            if earlier_age <= shown_age
        )
