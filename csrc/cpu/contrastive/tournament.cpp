#include "cpu/contrastive/tournament.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_pool.h"

namespace hpk {
namespace {

constexpr int64_t kTeam = 4;  // panels: two teams of 192 rows of 512 floats, with their sums, take 13 MB

// Who meets a in round r of n: in each round one, in n rounds everybody, once a itself. So teams meet, and so do the
// members of two teams.
int64_t opponent(int64_t round, int64_t a, int64_t n) { return (round - a + n) % n; }

// The a that meet somebody a' >= a in round r of n: the first ones up to r / 2, then those from r + 1 on.
int64_t pair_count(int64_t round, int64_t n) { return round / 2 + 1 + (n + round) / 2 - round; }
int64_t first_of_pair(int64_t round, int64_t index) { return index <= round / 2 ? index : round - round / 2 + index; }

class Tournament {
 public:
  Tournament(int64_t panels, int threads)
      : panels_(panels),
        teams_((panels + kTeam - 1) / kTeam),
        at_a_time_(std::min<int64_t>(teams_ / 2 + 1, std::max(threads, 1))),
        blocks_((teams_ / 2 + at_a_time_) / at_a_time_),
        turns_(static_cast<size_t>(panels)) {}

  int64_t tasks() const { return teams_ * blocks_ * kTeam * at_a_time_ * kTeam; }

  // Tasks are handed out in ascending order, and each waits for earlier ones alone: the earliest that is not done
  // never waits. As many pairs of teams as there are threads play at a time, so that there is seldom need to wait. That
  // changes no panel's order: in a round a team has one other.
  template <class Meet>
  void play(int64_t task, Meet&& meet) {
    const int64_t a = take(task, kTeam), pair = take(task, at_a_time_), k = take(task, kTeam);
    const int64_t index = take(task, blocks_) * at_a_time_ + pair, round = task;
    if (index >= pair_count(round, teams_)) return;
    const int64_t team = first_of_pair(round, index), other = opponent(round, team, teams_);
    const int64_t b = opponent(k, a, kTeam);
    if (team == other && a > b) return;
    const int64_t first = member(team, a), second = member(other, b), turn = round * kTeam + k;
    wait_for(first, turn);
    wait_for(second, turn);
    if (first >= 0 && second >= 0) meet(first, second);
    for (const int64_t panel : {first, second})
      if (panel >= 0) turns_[static_cast<size_t>(panel)].store(turn + 1, std::memory_order_release);
  }

 private:
  static int64_t take(int64_t& number, int64_t base) {
    const int64_t digit = number % base;
    number /= base;
    return digit;
  }

  // -1 past the end of a team
  int64_t member(int64_t team, int64_t a) const {
    const int64_t panel = team * panels_ / teams_ + a;
    return panel < (team + 1) * panels_ / teams_ ? panel : -1;
  }

  void wait_for(int64_t panel, int64_t turn) const {
    if (panel < 0) return;
    while (turns_[static_cast<size_t>(panel)].load(std::memory_order_acquire) != turn)
      std::this_thread::yield();
  }

  int64_t panels_, teams_, at_a_time_, blocks_;
  std::vector<std::atomic<int64_t>> turns_;  // of each panel: how many are over
};

}  // namespace

void run_tournament(int threads, int64_t panels, MeetFunction function, void* context) {
  if (panels == 0) return;
  Tournament games(panels, threads);
  parallel_for(threads, games.tasks(), [&](int64_t task, int worker) {
    games.play(task, [&](int64_t first, int64_t second) { function(context, first, second, worker); });
  });
}

}  // namespace hpk
