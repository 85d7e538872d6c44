"""What is worth doing for a disk's swap areas: numbers in, a plan out."""

from zramd.guest.areas import Area
from zramd.guest.policy import READ_BACK, WIPED, WORTH_PAGES, Plan, View, plan


def view(number: int, used: int, stored: int, pages: int = 1000) -> View:
    return View(Area(f"/dev/vdb{number}", pages, used, 101 - number), stored)


def names(plan: Plan) -> tuple[list[str], list[str]]:
    wiped, emptied = (
        [one.area.path.removeprefix("/dev/") for one in views] for views in (plan.wiped, plan.emptied)
    )
    return wiped, emptied


def test_nothing_dead_is_nothing_to_do() -> None:
    found = plan([view(1, 1000, 1000), view(2, 500, 500), view(3, 0, 0)], [])
    assert found == Plan([], 0, [])
    assert found.dead == 0


def test_little_dead_is_left() -> None:
    assert names(plan([view(1, 950, 1000)], [])) == ([], [])


def test_of_a_large_area_not_a_large_part_is_left() -> None:
    large = 1 << 20  # pages
    assert names(plan([view(1, 9, 9 + WORTH_PAGES - 1, large)], [])) == ([], [])
    assert names(plan([view(1, 9, 9 + WORTH_PAGES, large)], [])) == ([], ["vdb1"])


def test_areas_in_which_little_lives_are_emptied_the_emptiest_first() -> None:
    found = plan([view(1, 990, 1000), view(2, 200, 1000), view(3, 10, 1000), view(4, 0, 0)], [])
    assert names(found) == ([], ["vdb3", "vdb2"])
    assert found.dead == 1790


def test_an_area_that_is_not_discarded_is_wiped() -> None:
    one = View(Area("/dev/vdb1", 1000, 10, 100), 1000, discards=False)
    assert names(plan([one], [])) == (["vdb1"], [])


def test_no_more_is_read_back_than_is_worth_it() -> None:
    dead = 700
    most = int(READ_BACK * dead)
    assert names(plan([view(1, most, most + dead)], [])) == ([], ["vdb1"])
    assert names(plan([view(1, most + 1, most + 1 + dead)], [])) == (["vdb1"], [])


def test_where_much_lives_free_places_are_wiped() -> None:
    found = plan([view(1, 600, 1000), view(2, 10, 1000)], [])
    assert names(found) == (["vdb1"], ["vdb2"])
    assert found.pages == 400


def test_where_free_places_cannot_be_wiped_areas_are_emptied_alone() -> None:
    views = [view(1, 600, 1000), view(2, 10, 1000)]
    assert names(plan(views, [], can_wipe=False)) == ([], ["vdb2"])


def test_what_lies_before_a_wiped_area_is_wiped_with_it() -> None:
    found = plan([view(1, 990, 1000), view(2, 10, 1000), view(3, 500, 1000), view(4, 0, 500)], [])
    assert names(found) == (["vdb1", "vdb2", "vdb3"], ["vdb4"])
    assert found.pages == 10 + 990 + 500


def test_too_many_pages_are_not_written_for_few_dead() -> None:
    clean, dead = view(1, 0, 0, pages=10_000), view(2, 500, 1000)
    assert WIPED * dead.dead < 10_000
    assert names(plan([clean, dead], [])) == ([], [])


def test_one_that_is_too_dear_does_not_hinder_those_before_it() -> None:
    found = plan([view(1, 500, 1000), view(2, 0, 0, pages=100_000), view(3, 500, 1000)], [])
    assert names(found) == (["vdb1"], [])


def test_swap_elsewhere_that_is_filled_before_counts() -> None:
    here = [view(1, 600, 1000)]
    after, before = Area("/dev/sda2", 100_000, 0, -2), Area("/dev/sda2", 100_000, 0, 100)
    assert names(plan(here, [after])) == (["vdb1"], [])
    assert names(plan(here, [before])) == ([], [])


def test_the_order_is_the_kernels_not_that_of_the_list() -> None:
    views = [view(3, 10, 1000), view(1, 600, 1000), view(2, 20, 1000)]
    assert names(plan(views, [])) == (["vdb1"], ["vdb3", "vdb2"])
