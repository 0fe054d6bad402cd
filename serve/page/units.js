// Numbers as people read them; null is what is not known.

const UNKNOWN = "\u2013";

export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(1)} ${unit}`;
  }
  return `${count} B`;
}

export function rate(perSecond) {
  if (perSecond === null) return UNKNOWN;
  return perSecond === 0 ? "0" : perSecond.toFixed(perSecond < 10 ? 2 : perSecond < 100 ? 1 : 0);
}

export function seconds(value) {
  if (value === null) return UNKNOWN;
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

// In the reader's own time, without seconds.
export function moment(since1970) {
  const date = new Date(1000 * since1970);
  const two = (number) => String(number).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}`;
}
