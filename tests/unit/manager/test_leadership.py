from dataclasses import dataclass

from modelfleet.manager.leadership import Leadership
from modelfleet.manager.store.database import Database


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_leads_and_the_other_takes_over_once_it_is_silent(database: Database) -> None:
    clock, other_clock = Clock(), Clock(1e6)  # clocks need not agree
    leader = Leadership(database, 5, clock=clock)
    other = Leadership(database, 5, clock=other_clock)

    assert leader.campaign()
    assert not other.campaign()
    for _ in range(10):
        clock.now += 2
        other_clock.now += 2
        assert leader.campaign()
        assert not other.campaign()
    other_clock.now += 4.9
    assert not other.campaign()
    other_clock.now += 0.2

    assert other.campaign()
    with database.writing() as session:
        assert other.holds(session)
        assert not leader.holds(session)
    clock.now += 5.1
    assert not leader.campaign()


def test_a_leader_that_was_away_for_long_does_not_believe_it_leads(database: Database) -> None:
    clock, other_clock = Clock(), Clock()
    leader = Leadership(database, 5, clock=clock)
    other = Leadership(database, 5, clock=other_clock)
    assert leader.campaign()
    assert not other.campaign()
    other_clock.now += 5
    assert other.campaign()

    with database.writing() as session:
        assert not leader.holds(session)  # though its own clock says that it still leads

    clock.now += 2
    assert not leader.campaign()


def test_who_resigns_is_followed_at_once(database: Database) -> None:
    leader, other = Leadership(database, 1000), Leadership(database, 1000)
    assert leader.campaign()
    assert not other.campaign()

    leader.resign()

    assert other.campaign()
    leader.resign()
    assert other.campaign()
