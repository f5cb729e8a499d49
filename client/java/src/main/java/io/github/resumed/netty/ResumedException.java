package io.github.resumed.netty;

/** A wrong argument, setting or file; the message contains the remedy. */
public final class ResumedException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    ResumedException(String message) {
        super(message);
    }

    ResumedException(String message, Throwable cause) {
        super(message, cause);
    }
}
