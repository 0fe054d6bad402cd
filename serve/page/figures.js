// Rates out of counters: `figures` of GET v1/adapters, as it was asked within the last WINDOW seconds. Tokens are counted
// when their answer has ended, so a shorter window would show nothing but bursts.

const WINDOW = 30;

export class History {
  #samples = [];

  add(sample) {
    this.#samples = [...this.#samples, sample].filter((one) => sample.seconds - one.seconds <= WINDOW);
  }

  // After a silence the server may be another one, that counts from 0.
  forget() {
    this.#samples = [];
  }

  // Requests and tokens a second and the mean time to a first token, of one model; null is not known.
  of(id) {
    const [first, last] = [this.#samples.at(0), this.#samples.at(-1)];
    if (!first || first === last) return { requests: null, tokens: null, first: null };
    const grown = (key) => (last.models[id]?.[key] ?? 0) - (first.models[id]?.[key] ?? 0);
    const seconds = last.seconds - first.seconds;
    return {
      requests: grown("requests") / seconds,
      tokens: grown("output_tokens") / seconds,
      first: grown("first_tokens") > 0 ? grown("first_token_seconds") / grown("first_tokens") : null,
    };
  }

  // The same of all models together.
  all() {
    const total = (sample) => {
      const sums = {};
      for (const counts of Object.values(sample.models)) {
        for (const [key, value] of Object.entries(counts)) sums[key] = (sums[key] ?? 0) + value;
      }
      return { seconds: sample.seconds, models: { all: sums } };
    };
    const history = new History();
    history.#samples = this.#samples.map(total);
    return history.of("all");
  }
}
