/** Stops asking a store that keeps failing, so that an outage costs handshakes nothing, and for a moment one that is asked too often. */

/** How many failures in a row open a breaker. */
export const FAILURES = 3;
/** For how many milliseconds nobody asks a store that has just refused because of a limit; twice as long each time in a row. */
const FIRST_REST = 50;
const LONGEST_REST = 800;

/** Opened by failures in a row, closed by a success, which somebody else than a handshake has to try. Once closed by such a
 * trial, a single failure opens it again. */
export class Breaker {
  #failures = 0;
  #rest = 0;
  #restsUntil = 0;
  /** Whether handshakes may ask the store. */
  closed = true;
  /** Whether the last call was carried out, if there was any. */
  answered = true;

  /** Whether the store refused a call a moment ago because of a limit. */
  get resting(): boolean {
    return this.#rest > 0 && performance.now() < this.#restsUntil;
  }

  /** Notes a failed call, and tells whether it opened the breaker. */
  failed(): boolean {
    this.answered = false;
    this.#failures++;
    if (!this.closed || this.#failures < FAILURES) return false;
    this.closed = false;
    return true;
  }

  /** Notes a call that was refused because of a limit, and returns for how many milliseconds to make none. */
  limited(): number {
    this.answered = false;
    this.#rest = Math.min(Math.max(2 * this.#rest, FIRST_REST), LONGEST_REST);
    this.#restsUntil = performance.now() + this.#rest;
    return this.#rest;
  }

  /** Notes a call that was carried out in time, and tells whether it closed the breaker. */
  succeeded(): boolean {
    this.answered = true;
    this.#rest = 0;
    return this.reached();
  }

  /** Notes a call that was answered in time, whatever the answer, and tells whether it closed the breaker. */
  reached(): boolean {
    const closes = !this.closed;
    this.#failures = closes ? FAILURES - 1 : 0;
    this.closed = true;
    return closes;
  }
}
