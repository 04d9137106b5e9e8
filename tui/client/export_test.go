package client

// ServiceConfig is what a test compares with the protocol.
const ServiceConfig = serviceConfig
