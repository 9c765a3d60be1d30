// How the tokens of all rows are dealt out to blocks: in runs of equal length, row after row and, within a row, kv head
// after kv head. A run begins where the one before ends, in the middle of a row or not, so that all blocks have as much to
// do whatever the lengths are.
//
// Work is counted in steps of STEP tokens. A row is gone through by LINES = kv heads x passes lines, each in as many
// steps, and in one where nothing is to be read, so that its output is written. Where a line is cut, its first part goes
// into slot 1 of its block and every other into slot 0; a line that is not cut needs its own block's slot 1 for a moment.
constexpr int TILE = 32, STEP = TILE * WARPS;
constexpr int COLUMNS = HEADS > 8 && D <= 128 ? 16 : 8;  // query heads of a pass
constexpr int PASSES = (HEADS + COLUMNS - 1) / COLUMNS;
constexpr int ALIGNED = PAGE ? TILE : 8;  // where tiles may begin

struct Rows {
    const int *length, *exact_from;  // of the layer
    int batch, sinks, window, sliding;

    // The tokens of a row that are read from codes.
    DEVICE void span(int row, int& first, int& stop) const {
        const int tokens = length[row], unexact = exact_from[row];
        stop = tokens - window > unexact ? tokens - window : unexact;
        stop = (stop < tokens ? stop : tokens) - sinks;
        first = SLIDING ? tokens - sliding - sinks : 0;
        first = first > 0 ? first : 0;
    }
    DEVICE int steps(int row) const {
        int first, stop;
        span(row, first, stop);
        const int from = first & ~(ALIGNED - 1);
        return stop > from + STEP ? (stop - from + STEP - 1) / STEP : 1;
    }
    // Steps of one line of all rows; all lanes of a warp ask together.
    DEVICE int all_steps(int lane) const {
        int sum = 0;
        for (int row = lane; row < batch; row += 32) sum += steps(row);
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum += (int)shuffle_xor((u32)sum, mask);
        return sum;
    }
    // The row that has the step `at` of all lines of all rows, and the steps of one line of the rows before it.
    DEVICE int row_of(int at, int lines, int lane, int& before) const {
        before = 0;
        for (int some = 0; some < batch; some += 32) {
            const int mine = some + lane < batch ? steps(some + lane) : 0;
            int sum = mine, ahead = before;
#pragma unroll
            for (int mask = 1; mask < 32; mask *= 2) {
                const int other = (int)shuffle_xor((u32)sum, mask);
                if (lane & mask) ahead += other;
                sum += other;
            }
            const bool here = lines * ahead <= at && at < lines * (ahead + mine);
            if (any_lane(here)) {
                u32 found = here ? lane : 0, start = here ? ahead : 0;
#pragma unroll
                for (int mask = 16; mask; mask /= 2) found += shuffle_xor(found, mask), start += shuffle_xor(start, mask);
                before = (int)start;
                return some + (int)found;
            }
            before += sum;
        }
        return batch - 1;
    }
};

// The first step of a block, and the block that a step is in, where no block has nothing to do.
DEVICE int first_step(int steps, int block, int blocks) { return (int)((long long)steps * block / blocks); }
DEVICE int block_of(int steps, int at, int blocks) { return (int)(((at + 1LL) * blocks - 1) / steps); }

DEVICE int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

DEVICE Rows rows_of(const int* layer, const int* length, const int* exact_from, const int* sliding, int batch, int sinks,
                    int window, int all_layers) {
    const long long from = (long long)clamp(layer[0], all_layers - 1) * batch;
    return {length + from, exact_from + from, batch, sinks, window, SLIDING ? sliding[0] : 0};
}
