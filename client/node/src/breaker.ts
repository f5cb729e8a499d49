/** Stops asking a store that keeps failing, so that an outage costs handshakes nothing. */

/** How many failures in a row open a breaker. */
export const FAILURES = 3;

/** Opened by failures in a row, closed by a success, which somebody else than a handshake has to try. Once closed by such a
 * trial, a single failure opens it again. */
export class Breaker {
  #failures = 0;
  /** Whether handshakes may ask the store. */
  closed = true;
  /** Whether the last call was answered, if there was any. */
  answered = true;

  /** Notes a failed call, and tells whether it opened the breaker. */
  failed(): boolean {
    this.answered = false;
    this.#failures++;
    if (!this.closed || this.#failures < FAILURES) return false;
    this.closed = false;
    return true;
  }

  /** Notes a call that was answered in time, and tells whether it closed the breaker. */
  succeeded(): boolean {
    const closes = !this.closed;
    this.#failures = closes ? FAILURES - 1 : 0;
    this.closed = this.answered = true;
    return closes;
  }
}
