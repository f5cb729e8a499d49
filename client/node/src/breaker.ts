/** Stops asking a store that keeps failing, so that an outage costs handshakes nothing, and for a moment one that is asked too often. */

/** How many failures in a row open a breaker. */
export const FAILURES = 3;
/** For how many milliseconds nobody asks a store that has just refused because of a limit; twice as long each time in a row. */
const [FIRST_REST, LONGEST_REST] = [50, 800];
/** Milliseconds before each trial of a store that keeps failing; twice as long each time in a row. */
const [FIRST_PAUSE, LONGEST_PAUSE] = [50, 500];
/** Milliseconds for which a breaker must not have opened, so that its next trials begin with FIRST_PAUSE again. */
const CALM = 10_000;

/**
 * Opened by failures in a row, closed by a success, which somebody else than a handshake has to try. Once closed by such a
 * trial, a single failure opens it again. Calls that were under way together count once: a machine that stands still for a
 * moment makes all of them late. All times are milliseconds of performance.now().
 */
export class Breaker {
  #failures = 0;
  #failedAt = -Infinity;
  #openedAt = -Infinity;
  #pause = 0;
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

  /** Notes that a call failed which began then, and tells whether that opened the breaker. */
  failed(began: number): boolean {
    this.answered = false;
    if (began < this.#failedAt) return false;
    this.#failures++;
    this.#failedAt = performance.now();
    if (!this.closed || this.#failures < FAILURES) return false;
    if (this.#failedAt - this.#openedAt > CALM) this.#pause = 0;
    this.#openedAt = this.#failedAt;
    this.closed = false;
    return true;
  }

  /** Returns how many milliseconds to wait before the store is tried again. */
  nextPause(): number {
    this.#pause = Math.min(Math.max(2 * this.#pause, FIRST_PAUSE), LONGEST_PAUSE);
    return this.#pause;
  }

  /** Notes that a call which began then was refused because of a limit, and returns for how many milliseconds to make none. */
  limited(began: number): number {
    this.answered = false;
    const [now, restsFrom] = [performance.now(), this.#restsUntil - this.#rest];
    if (this.#rest === 0 || began >= restsFrom || now >= this.#restsUntil) {
      this.#rest = Math.min(Math.max(2 * this.#rest, FIRST_REST), LONGEST_REST);
      this.#restsUntil = now + this.#rest;
    }
    return this.#restsUntil - now;
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
